"""One edit, or two beside each other, opened as a page: `qwenedit explore`, `qwenedit.explore`.

plan.py decides what is kept, so that the page has a bounded size; words.py names the text's tokens;
watching.py looks at a run while it goes; page.py makes the page of page.html, page.css and page.js;
explore.py is all of it in a row.
"""
