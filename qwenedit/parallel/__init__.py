"""One edit over several processes: who they are, what each computes, and that they agree.

    spec        "cfg=2,ulysses=4" -> how many processes for what
    processes   the processes that torchrun started, in groups; agreement before a run; failures
    branches    cfg: each half of the processes computes one branch of guidance
    ulysses     each process holds a share of the tokens, and in attention of the heads

The engine is torch.distributed. The networks know of it that tokens may be shared (`taps.Shards`), no more.
"""
