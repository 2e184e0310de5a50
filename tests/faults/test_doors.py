"""What comes in from outside: files, configs, the hub's answers, each accepted only as what it should be."""

RECORD = {
    "key": "k1", "status": "done", "model": "the embedded model", "picture": "mini:0", "prompt": "a",
    "seed": 0, "height": None, "width": None, "true_cfg_scale": 1.0, "steps": 2, "negative_prompt": " ", "switches": {},
    "fingerprint": "f", "qwenedit": "0", "torch": "2", "python": "3", "dtype": "torch.float32", "threads": 1,
    "commit": None, "device": "cpu", "deterministic": None, "at": "2026-01-01T00:00:00+00:00",
    "file": "pictures/k1.png", "seconds": {"encode": 0.1, "sample": 0.2, "decode": 0.1},
    "metrics": {"success": True, "strict": False, "preserved": None, "reason": "x", "psnr": 3.0},
    "curves": {
        "sigma": [1.0, 0.5], "velocity": [2.0, 1.0],
        "norm_ratio": {"mean": [None, 1.0], "min": [None, 1.0], "max": [None, 1.0]},
    },
    "attention": {"text": [[0.1, 0.2]], "target": [[0.4, 0.5]], "references": [[0.5, 0.3]]}, "baseline": "k0",
}  # fmt: skip
