"""Published methods as interventions: functions of a pipeline that return a context manager.

with kv_inject(pipe):
    pipe.edit(picture, "make the circle red")

`qwenedit ablate examples/methods.toml` runs all of them; docs/methods.md has what they do to held-out edits.
Blocks and steps are chosen for the embedded model, which has 6 blocks; with another one give its own.
"""
