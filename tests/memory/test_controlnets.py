"""ControlNets in the memory modes: the resident run's bits, from weights that are there in their turn."""

import copy
import functools
import json
import warnings

import pytest
import torch

import qwenedit
from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes, current_modes, present
from qwenedit.memory.streaming import Absent, Streamed
from qwenedit.taps import taps
from qwenedit.weights.controlnets import compare_controlnet
from tests.sparse import no_holes, write_holes, write_sparse
from tests.tiny import checkpoint, picture
from tests.tiny_controlnet import blockwise, controlnet
from tests.weights.test_controlnets import CONFIGS, FILES, blockwise_keys, keys

NETS = {
    "official": (controlnet,),
    "inpainting": (functools.partial(controlnet, extra_condition_channels=4),),
    "blockwise": (blockwise,),
    "both": (controlnet, functools.partial(blockwise, extra_condition_channels=4)),
}
MODES = [
    {"residency": residency, "modulation": modulation}
    for residency in ("resident", "stage", "stream")
    for modulation in ("live", "precomputed")
][1:]
every_mode = pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(modes.values()))
every_kind = pytest.mark.parametrize("kind", NETS)


def load(kind, **options):
    nets = [make() for make in NETS[kind]]
    base = checkpoint("plus", zero_cond_t=True)
    return qwenedit.load(base, controlnet=nets, **{"device": "cpu", "progress": False, **options})


def run(pipe, **options):
    """A batch of two prompts with different pictures, an odd grid, guidance, and controls that end early."""
    count = len(pipe.controlnets)
    masked = any(net.config.extra_condition_channels for net in pipe.controlnets)
    case = {
        "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)],
        "num_inference_steps": 2, "height": 48, "width": 80, "output_type": "latent",
        "control_image": [picture(48, 80, seed) for seed in range(count)],
        "control_mask": picture(60, 60, seed=5) if masked else None,
        "controlnet_conditioning_scale": [0.7] * count, "control_guidance_end": [1.0, 0.5][:count],
    }  # fmt: skip
    images = [[picture(60, 44)], [picture(40, 70, seed=1), picture(50, 50, seed=2)]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes
        return pipe.edit(images, ["turn left", "一个红色的圆"], **{**case, **options}).images


@functools.cache
def resident(kind):
    return run(load(kind))


def gone(networks):
    return all(isinstance(x, Absent) and x.is_meta for net in networks for x in net.parameters())


@every_mode
@every_kind
def test_every_mode_gives_the_resident_runs_bits(kind, modes):
    pipe = load(kind, **modes)
    assert current_modes(pipe.mmdit) == Modes(**modes)
    for net in pipe.controlnets:
        wanted = (
            Modes() if modes == {"residency": "resident", "modulation": "precomputed"} else Modes(**modes)
        )
        assert current_modes(net) == wanted
        assert isinstance(net.blocks, Streamed) == (modes["residency"] == "stream")
    for _ in range(2):
        assert torch.equal(run(pipe), resident(kind))
        assert gone(pipe.controlnets) == (modes["residency"] != "resident")


@pytest.mark.parametrize("residency", ["stage", "stream"])
def test_a_net_that_is_loaded_later_follows_its_pipeline(residency):
    pipe = load("official", residency=residency)
    pipe.load_controlnet(blockwise(extra_condition_channels=4))
    assert gone(pipe.controlnets) and torch.equal(run(pipe), resident("both"))


@pytest.mark.parametrize("residency", ["stage", "stream"])
@every_kind
def test_rows_that_run_one_by_one(kind, residency):
    whole, streamed = load(kind), load(kind, residency=residency)
    whole.micro_batch = streamed.micro_batch = 1
    assert torch.equal(run(streamed), run(whole))


@every_kind
def test_taps_see_the_same_in_every_mode(kind):
    def seen(pipe):
        found = {}

        def keep(x, site):
            key = site.full, site.labels["step"], site.labels["branch"], tuple(site.labels["rows"])
            found[key] = x

        for net in pipe.controlnets:
            with taps(net, {"*residual": keep}), taps(pipe.mmdit, {"*control_add": keep}):
                run(pipe)
        return found

    wanted, got = seen(load(kind)), seen(load(kind, residency="stream"))
    assert wanted.keys() == got.keys() and {key[0] for key in wanted} >= {
        "blocks.0.control_add", "blocks.1.control_add", "blocks.0.residual", "blocks.1.residual"
    }  # fmt: skip
    assert all(torch.equal(x, got[key]) for key, x in wanted.items())


@pytest.mark.parametrize("residency", ["stage", "stream"])
def test_nets_are_loaded_for_runs_under_control_only(residency, monkeypatch):
    pipe = load("both", residency=residency)
    for net in pipe.controlnets:
        monkeypatch.setattr(type(net.__dict__["_managed"]), "__enter__", entered := counting(net))
    run(
        pipe,
        control_image=None,
        control_mask=None,
        controlnet_conditioning_scale=1.0,
        control_guidance_end=1.0,
    )
    assert entered.of_nets == 0
    run(pipe)
    assert entered.of_nets > 0


def counting(net):
    original = type(net.__dict__["_managed"]).__enter__

    def enter(self):
        enter.of_nets += self.component == "controlnet"
        return original(self)

    enter.of_nets = 0
    return enter


@pytest.mark.parametrize("residency", ["stage", "stream"])
def test_a_run_that_is_broken_off_leaves_nothing_behind(residency):
    pipe = load("both", residency=residency)

    def fail(_x, _site):
        raise RuntimeError("stop")

    for net in pipe.controlnets:
        with pytest.raises(RuntimeError, match="stop"), taps(net, {"blocks.1.residual": fail}):
            run(pipe)
        assert gone([*pipe.controlnets, pipe.mmdit])
    assert torch.equal(run(pipe), resident("both"))


@every_kind
def test_float8_is_an_approximation_that_streams_alike(kind):
    rounded = load(kind, storage="float8")
    assert all(current_modes(net).storage == "float8" for net in rounded.controlnets)
    got = run(rounded)
    assert 0 < (got - resident(kind)).abs().max() < 0.5 * resident(kind).abs().max()
    assert torch.equal(run(load(kind, storage="float8", residency="stage")), got)


def test_offloading_after_loading():
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        pipe = load("both", residency="resident")
        getattr(pipe, method)(device="cpu")
        assert gone(pipe.controlnets) and torch.equal(run(pipe), resident("both"))


def test_copies_and_weights_by_hand():
    pipe = copy.deepcopy(load("both", residency="stream"))
    assert torch.equal(run(pipe), resident("both"))
    net, x = pipe.controlnets[1], torch.zeros(1, 15, 68)
    with pytest.raises(
        ValueError, match=r"of the controlnet are in its files.*present\(\*pipe\.controlnets\)"
    ):
        net(x)
    with present(*pipe.controlnets), torch.no_grad():
        assert net(x).shape == (1, 15, 32)
    with pytest.raises(ValueError, match="weights of the controlnet are read from its files again and again"):
        pipe.controlnets[0:] = [net]
        qwenedit.memory.residency.move([net], torch.bfloat16)


# --- what fits


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Checkpoints of the official size: a transformer's, and ControlNets by their kind."""
    folder = tmp_path_factory.mktemp("official")
    if reason := no_holes(folder):
        pytest.skip(reason)
    nets = {"blockwise": folder / "blockwise.safetensors"}
    write_holes(nets["blockwise"], blockwise_keys(0))
    for name, (stem, _, _) in FILES.items():
        (path := folder / name).mkdir()
        write_holes(path / "diffusion_pytorch_model.safetensors", keys(stem))
        (path / "config.json").write_text(json.dumps(CONFIGS[name]))
        nets[name] = path
    return write_sparse(folder / "checkpoint"), nets


def added(folder, nets, **options):
    """What ControlNets add to the peaks, by mode and stage."""
    without, made = (plan(folder, device_memory="80GiB", controlnets=one, **options) for one in ((), nets))
    return {
        mode: {stage: made.peaks[mode][stage] - without.peaks[mode][stage] for stage in STAGES}
        for mode in made.peaks
    }


@pytest.mark.parametrize(
    "name, blocks, residuals",
    [("Qwen-Image-ControlNet-Union", 5, 5), ("Qwen-Image-ControlNet-Inpainting", 6, 6), ("blockwise", 60, 0)],
)
def test_the_plan_counts_weights_and_what_is_kept_of_them(official, name, blocks, residuals):
    folder, nets = official
    compared = compare_controlnet(nets[name], qwenedit.weights.configs.network_config(folder, "transformer"))
    state = compared.module.state_dict()
    whole = 2 * sum(x.numel() for x in state.values())
    block = 2 * sum(x.numel() for key, x in state.items() if key.startswith("blocks.0."))
    kept = 2 * (1 + residuals) * 64 * 64 * 3072
    more = added(folder, [nets[name]], height=1024, width=1024)
    rest, of_transformer = whole - blocks * block, 2 * 339_831_296
    for modulation in ("live", "precomputed"):  # a ControlNet's adaLN layers stay
        assert more[Modes("resident", modulation)]["sampling"] == whole + kept
        assert more[Modes("resident", modulation)]["VAE decode"] == whole
        assert more[Modes("stage", modulation)]["sampling"] == whole + kept
        assert more[Modes("stage", modulation)]["text encoding"] == 0
        # Two blocks of the net, and then two of the transformer: the larger count.
        larger = max(0, block - of_transformer + (modulation == "precomputed") * 2 * 6_796_984_320 // 60)
        assert more[Modes("stream", modulation)]["sampling"] == rest + 2 * larger + kept
    float8 = more[Modes("stage", storage="float8")]["sampling"] - kept
    assert 0.5 * whole < float8 < 0.5 * whole + 2 * block + 0.1 * whole


def test_several_nets_add_up_and_a_control_picture_is_encoded(official):
    folder, nets = official
    mode, both = Modes("stage"), [nets["Qwen-Image-ControlNet-Union"], nets["blockwise"]]
    one, other, together = (added(folder, some)[mode]["sampling"] for some in (both[:1], both[1:], both))
    assert together == one + other
    alone, under = (plan(folder, device_memory="80GiB", pictures=0, controlnets=some) for some in ((), both))
    assert under.peaks[mode]["VAE encode"] > alone.peaks[mode]["VAE encode"]
    assert str(under.run).endswith("from 0 pictures with 2 of control")


def test_a_net_can_decide_the_mode(official):
    folder, nets = official
    memory = max(plan(folder, device_memory="200GiB").peaks[Modes("resident")].values()) / 0.95
    memory = f"{memory / 2**30 + 0.5:.2f}GiB"
    assert str(plan(folder, device_memory=memory).mode) == "resident"
    net = nets["Qwen-Image-ControlNet-Union"]
    assert str(plan(folder, device_memory=memory, controlnets=[net]).mode) != "resident"


def test_auto_counts_the_nets(monkeypatch):
    import qwenedit.memory.plan as planning

    monkeypatch.setattr(planning, "_SMALL", 0)
    base, net = checkpoint("plus", zero_cond_t=True), controlnet(seed=8)
    options = {"device": "cpu", "dtype": "float32"}
    alone, beside = (plan(base, **options, controlnets=some).peaks[Modes()] for some in ((), [net]))
    between = (max(alone.values()) + max(beside.values())) / 2 / planning.SPARE
    monkeypatch.setattr(planning, "host_free", lambda: between)
    load = functools.partial(qwenedit.load, base, device="cpu", progress=False)
    assert current_modes(load().mmdit) == Modes()
    pipe = load(controlnet=net)
    assert {current_modes(one).residency for one in (pipe.mmdit, *pipe.controlnets)} == {"stage"}


def test_what_is_planned_is_what_is_loaded():
    from qwenedit.memory.sizes import network_sizes
    from qwenedit.weights.loading import compare_networks

    base = checkpoint("edit")
    compared = [one for one in compare_networks(base, ["transformer"])]
    config = compared[0].module.config
    nets = [compare_controlnet(path, config) for path in (controlnet(), blockwise())]
    found = {"transformer": compared[0].found} | {f"controlnet {n}": one.found for n, one in enumerate(nets)}
    for dtype in (torch.float32, torch.bfloat16, None):
        sizes = network_sizes(found, dtype)
        pipe = qwenedit.load(
            base, device="cpu", progress=False, dtype=dtype, controlnet=[controlnet(), blockwise()]
        )
        for number, net in enumerate(pipe.controlnets):
            assert sizes[f"controlnet {number}"].all == sum(x.nbytes for x in net.parameters())
