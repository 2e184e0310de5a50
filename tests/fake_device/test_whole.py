"""One whole edit with every block of every network, and the texts of an official call."""

import torch

from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse

VARIANT = "Qwen-Image-Edit-2511"


def test_an_edit_with_two_pictures_and_sixty_blocks(tmp_path):
    folder = write_sparse(tmp_path, VARIANT)
    with fake_device() as device:
        pipe = models.load(folder)
        assert sum(x.numel() for x in pipe.mmdit.parameters()) == 20_430_401_088
        ran = models.run(pipe, device, VARIANT)
        weights = device.now
    assert ran.images.shape == (1, 3, 1024, 1024) and ran.images.dtype == torch.bfloat16
    assert ran.waits[1] - ran.waits[0] == 1
    for stage in ("sampling", "VAE decode"):
        made_on_cpu = {place for place, where, _ in ran.stages[stage].placed if where == "cpu"}
        assert made_on_cpu <= {"latents.py _per_channel"}
    planned = plan(folder, device_memory="200GiB", pictures=2).peaks[Modes("resident")]
    for stage in STAGES:
        got = ran.stages[stage].peak
        assert abs(planned[stage] - got) < 0.02 * got, stage
        assert got > weights
