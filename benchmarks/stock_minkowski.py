"""Our engines against an encoder written with MinkowskiEngine's own layers.

    .venv/bin/python benchmarks/stock_minkowski.py [--model atto] [--batch_size 16] [--rounds 5]

`fcmae bench` compares our engines with each other and with timm. Medians of interleaved rounds in
one process; forward and backward, float32.
"""

import argparse
import sys
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fcmae.commands.bench import BenchConfig
from fcmae.inspect.steps import example, make_step, time_in_turns
from sparse.engines.minkowski import load_minkowski, why_unavailable
from sparse.sizes import SIZES


class StockBlock(nn.Module):
    """A ConvNeXt V2 block made of MinkowskiEngine's layers; GRN over the whole batch."""

    def __init__(self, me: Any, dim: int) -> None:
        super().__init__()
        self.me = me
        self.conv_dw = me.MinkowskiChannelwiseConvolution(
            dim, kernel_size=7, bias=True, dimension=2
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = me.MinkowskiLinear(dim, 4 * dim)
        self.act = me.MinkowskiGELU()
        self.weight = nn.Parameter(torch.zeros(4 * dim))
        self.bias = nn.Parameter(torch.zeros(4 * dim))
        self.fc2 = me.MinkowskiLinear(4 * dim, dim)

    def forward(self, x: Any) -> Any:
        y = self.conv_dw(x)
        y = self.act(self.fc1(self._with(y, self.norm(y.F))))
        norm = torch.linalg.vector_norm(y.F, dim=0, keepdim=True)
        scaled = y.F * (norm / (norm.mean(-1, keepdim=True) + 1e-6))
        return x + self.fc2(self._with(y, self.weight * scaled + self.bias + y.F))

    def _with(self, x: Any, features: Tensor) -> Any:
        return self.me.SparseTensor(
            features, coordinate_map_key=x.coordinate_map_key,
            coordinate_manager=x.coordinate_manager,
        )  # fmt: skip


class StockEncoder(nn.Module):
    """Stem on the dense image, then blocks and strided convolutions on MinkowskiEngine tensors."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.me: Any = load_minkowski()
        size = SIZES[model]
        self.stem = nn.Conv2d(3, size.dims[0], 4, stride=4)
        self.stem_norm = nn.LayerNorm(size.dims[0], eps=1e-6)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in size.dims[:-1])
        self.strided = nn.ModuleList(
            self.me.MinkowskiConvolution(a, b, kernel_size=2, stride=2, bias=True, dimension=2)
            for a, b in zip(size.dims[:-1], size.dims[1:], strict=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(StockBlock(self.me, dim) for _ in range(depth)))
            for depth, dim in zip(size.depths, size.dims, strict=True)
        )

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        visible = (~mask).repeat_interleave(8, 1).repeat_interleave(8, 2)
        rows = self.stem_norm(self.stem(images).permute(0, 2, 3, 1)[visible])
        x = self.me.SparseTensor(rows, coordinates=visible.nonzero().int().contiguous())
        for i, stage in enumerate(self.stages):
            if i:
                features = self.norms[i - 1](x.F)
                x = self.strided[i - 1](
                    self.me.SparseTensor(
                        features, coordinate_map_key=x.coordinate_map_key,
                        coordinate_manager=x.coordinate_manager,
                    )
                )  # fmt: skip
            x = stage(x)
        return x.F


def stock_step(model: str, images: Tensor, mask: Tensor) -> Any:
    encoder = StockEncoder(model)
    threads = torch.get_num_threads()

    def step() -> None:
        encoder(images, mask).square().mean().backward()
        encoder.zero_grad(set_to_none=True)
        torch.set_num_threads(threads)  # its coordinate manager changes it

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="atto", choices=list(SIZES))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if why_unavailable() is not None:
        parser.error(str(why_unavailable()))
    cpu = torch.device("cpu")
    images, mask = example(BenchConfig(batch_size=options.batch_size), cpu)
    steps: dict[str, Any] = {
        name: partial(make_step(name, options.model, cpu), images, mask)
        for name in ("patch", "minkowski")
    }
    steps["stock MinkowskiEngine"] = stock_step(options.model, images, mask)
    seconds = time_in_turns(steps, options.rounds, cpu)
    table = Table(title=f"{options.model}, batch {options.batch_size}, 224 px, 60 % hidden")
    for heading in ("", "images/s", "÷ stock"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in seconds.items():
        ratio = seconds["stock MinkowskiEngine"] / value
        table.add_row(name, f"{options.batch_size / value:.1f}", f"{ratio:.2f}")
    console = Console(highlight=False)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
