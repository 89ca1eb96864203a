"""The command line with two models of torchvision that timm lacks: ShuffleNet V2 and SqueezeNet.

python -m benchmarks.experiments.with_torchvision finetune --model shufflenet_v2_x1_0 …
"""

import sys
from typing import Any

from timm.models import register_model
from torch import nn
from torchvision.models import shufflenet_v2_x1_0, squeezenet1_1

from fcmae.cli import main

CLASSIFIERS = {shufflenet_v2_x1_0: ("conv1.0", "fc"), squeezenet1_1: ("features.0", "classifier.1")}
"""Names of the first and of the last layer."""


def _register(build: Any, first: str, last: str) -> None:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> nn.Module:
        if in_chans != 3:
            raise ValueError(f"{build.__name__} takes 3 channels")
        model: Any = build(num_classes=num_classes)
        size = {"input_size": (3, 224, 224)}
        model.pretrained_cfg = model.default_cfg = {"first_conv": first, "classifier": last, **size}
        model.num_classes = num_classes
        return model

    create.__name__ = create.__qualname__ = build.__name__
    register_model(create)


for _build, _layers in CLASSIFIERS.items():
    _register(_build, *_layers)

if __name__ == "__main__":
    sys.exit(main())
