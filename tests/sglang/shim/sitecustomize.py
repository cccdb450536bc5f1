"""torchvision's wheel is a CUDA build: beside a CPU torch its C library does not load, and its import fails on two
operators that nobody calls. They are declared just before it is imported.
"""

import sys
from importlib.abc import MetaPathFinder


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import define

            for name in ("nms", "qnms"):
                define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
