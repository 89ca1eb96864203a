"""ConvNeXt blocks of a timm model, computed like those of the encoder.

On a CPU, timm's blocks spend most of a step on passes over tensors 4C wide that no cache holds, and
on the weight gradient of the depthwise convolution. Parameters, names and results stay timm's, up
to float noise.
"""

from timm.layers.activations import GELU
from timm.layers.mlp import GlobalResponseNormMlp
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from sparse.block import weight_and_bias
from sparse.ops.depthwise import depthwise
from sparse.ops.grn_mlp import LAYER_NORM_EPS, grn_mlp
from sparse.rows import ImageRows


class DepthwiseConv2d(nn.Conv2d):
    """See `sparse.ops.depthwise.depthwise`."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return depthwise(x_BCHW, *weight_and_bias(self))


class FusedBlock(ConvNeXtBlock):
    """A ConvNeXt V2 block (arXiv 2301.00808, figure 5): see `sparse.ops.grn_mlp.grn_mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        y_BCHW = self.conv_dw(x)
        b, c, h, w = y_BCHW.shape
        rows_NC = y_BCHW.permute(0, 2, 3, 1).reshape(-1, c)
        rows_NC = grn_mlp(rows_NC, self.norm, self.mlp, ImageRows(b, h * w, x.device))
        y_BCHW = rows_NC.view(b, h, w, c).permute(0, 3, 1, 2)
        if self.gamma is not None:
            y_BCHW = y_BCHW * self.gamma.view(-1, 1, 1)
        return self.drop_path(y_BCHW) + self.shortcut(x)


def speed_up(model: nn.Module, compiled: bool = False) -> None:
    """Switch the ConvNeXt blocks of a model on a CPU to this computation.

    Other models, and layers unlike those of a published ConvNeXt, stay unchanged.

    Args:
        model: on its device.
        compiled: the model will be compiled, which is faster with timm's MLP.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for block in model.modules():
        if not isinstance(block, ConvNeXtBlock):
            continue
        if _keeps_size(block.conv_dw):
            block.conv_dw.__class__ = DepthwiseConv2d
        if type(block) is ConvNeXtBlock and _is_v2(block) and not compiled:
            block.__class__ = FusedBlock


def _keeps_size(conv: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.bias is not None
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1, 1), (1, 1), "zeros")
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
    )


def _is_v2(block: ConvNeXtBlock) -> bool:
    mlp, norm = block.mlp, block.norm
    return (
        isinstance(mlp, GlobalResponseNormMlp)
        and isinstance(mlp.act, GELU)
        and isinstance(norm, nn.LayerNorm)
        and norm.eps == LAYER_NORM_EPS
        and mlp.drop1.p == mlp.drop2.p == 0
    )
