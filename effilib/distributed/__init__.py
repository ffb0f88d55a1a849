"""Train over several processes as one (`ranks`), and call a function in several processes (`processes`)."""

from effilib.distributed.ranks import ALONE, Ranks, gpu, ranks, several, sync_

__all__ = ["ALONE", "Ranks", "gpu", "ranks", "several", "sync_"]
