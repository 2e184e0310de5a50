"""Change one thing about the system by name, and see what it did.

switches.py holds what can be changed, pictures.py and running.py change it; spec.py, sweep.py, metrics.py and
report.py run a grid of changes and show the effect.
"""

from qwenedit.sampling.guidance import Guidance
from qwenedit.switches import References, Seen, Switches, Time, VAEPath

__all__ = ["Guidance", "References", "Seen", "Switches", "Time", "VAEPath"]
