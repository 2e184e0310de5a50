"""One edit over several processes: who they are, what each computes, and that they agree.

    spec        "cfg=2,ulysses=4" -> how many processes for what
    processes   the processes that torchrun started, in groups; agreement before a run; failures
    digest      what must be equal in all of them before a run
    runs        what a run does besides: it begins with an agreement, and starts from the same
    branches    cfg: each half of the processes computes one branch of guidance
    ulysses     each process holds a share of the tokens, and in attention of the heads
    split       tensor and split weights: each process holds a part of the weights

The engine is torch.distributed. The networks know of it that tokens may be shared (`taps.Shards`), no more.
"""
