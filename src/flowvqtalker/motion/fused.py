"""The inverse of a flow for one frame at a time, with everything precomputed that does not change between frames.

Frame-by-frame sampling costs operations, not multiplications. For a fixed emotion, the inverse linear map and the
inverse multi-actnorm of a step are one matrix, and the keys and values of all steps are one product. A change of
emotion takes four operations for all steps together, so it may come with every frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowvqtalker.motion.bijections import SCALE_BIAS, SCALE_FLOOR, Context
from flowvqtalker.motion.flow import Flow, FlowStep

__all__ = ["FusedInverse"]


class FusedInverse:
    """:meth:`Flow.inverse` for a batch of one, up to rounding, from a snapshot of the weights.

    Arguments:
        flow: the flow.
        emotion: (1, C) weights of the classes.
    """

    @torch.no_grad()
    def __init__(self, flow: Flow, emotion: Tensor) -> None:
        config = flow.config
        self.heads, self.head = config.heads, config.width // config.heads
        self.layers, self.count = config.layers, config.steps
        self.first, self.width = config.dim // 2, config.width
        steps = flow.each_step()
        blocks = [block for step in steps for block in step.coupling.net.each_block()]
        self.memory_weight = torch.cat([torch.cat([b.key.weight, b.value.weight]) for b in blocks]).mT.contiguous()
        self.memory_bias = torch.cat([torch.cat([b.key.bias, b.value.bias]) for b in blocks])
        self.nets = [self._prepare(step) for step in steps]
        self.data_std = flow.data_std
        self._linear = torch.stack([step.linear.inverse_matrix().mT for step in steps])  # K D D, transposed
        self._means = torch.stack([step.norm.mean for step in steps])  # K C D
        self._log_scales = torch.stack([step.norm.log_scale for step in steps])
        self.affine: list[tuple[Tensor, Tensor]] = []
        self.set_emotion(emotion)

    @torch.no_grad()
    def set_emotion(self, emotion: Tensor) -> None:
        """Change the emotion, (1, C) weights."""
        spread = Context(emotion[:, None], emotion).spread
        offsets = emotion @ self._means  # K 1 D
        matrices = self._linear * torch.exp(spread @ self._log_scales)
        self.affine = list(zip(offsets.unbind(), matrices.unbind(), strict=True))

    def _prepare(self, step: FlowStep) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
        net = step.coupling.net
        blocks = []
        for block in net.each_block():
            shrink = self.head**-0.5
            blocks.append(
                [
                    *(block.norm_attention.weight, block.norm_attention.bias),
                    *((block.query.weight * shrink).mT.contiguous(), block.query.bias * shrink),
                    *(block.merge.weight.mT.contiguous(), block.merge.bias),
                    *(block.norm_mlp.weight, block.norm_mlp.bias),
                    *(block.expand.weight.mT.contiguous(), block.expand.bias),
                    *(block.contract.weight.mT.contiguous(), block.contract.bias),
                ]
            )
        bias = net.out.bias.clone()
        bias[len(bias) // 2 :] += SCALE_BIAS
        start = [net.embed.weight.mT.contiguous(), net.embed.bias]
        return start, blocks, [net.norm.weight, net.norm.bias, net.out.weight.mT.contiguous(), bias]

    @torch.inference_mode()
    def __call__(self, z: Tensor, context: Context) -> Tensor:
        """
        Arguments:
            z: (1, D) latent.
            context: of one frame, with the emotion set before.

        Returns:
            (1, D) frame.
        """
        addmm, layer_norm, shape = torch.addmm, torch.layer_norm, (self.width,)
        memory = addmm(self.memory_bias, context.tokens[0], self.memory_weight)
        split = memory.view(len(memory), -1, 2, self.heads, self.head).permute(2, 1, 3, 0, 4).contiguous()
        keys, values = split[0].mT.unbind(0), split[1].unbind(0)  # each layer: H d M and H M d
        x = z
        for number in range(self.count - 1, -1, -1):
            (embed, embed_bias), blocks, (norm, norm_bias, out, out_bias) = self.nets[number]
            half = x[:, : self.first]
            y = addmm(embed_bias, half, embed)
            for layer, block in enumerate(blocks):
                n1, n1b, wq, bq, wm, bm, n2, n2b, we, be, wc, bc = block
                at = number * self.layers + layer
                query = addmm(bq, layer_norm(y, shape, n1, n1b), wq).view(self.heads, 1, self.head)
                read = torch.bmm(torch.softmax(torch.bmm(query, keys[at]), -1), values[at])
                y = y + addmm(bm, read.view(1, self.width), wm)
                hidden = torch.nn.functional.gelu(addmm(be, layer_norm(y, shape, n2, n2b), we), approximate="tanh")
                y = y + addmm(bc, hidden, wc)
            shift, raw = addmm(out_bias, layer_norm(y, shape, norm, norm_bias), out).chunk(2, 1)
            other = x[:, self.first :] / (torch.sigmoid(raw) + SCALE_FLOOR) - shift
            offset, matrix = self.affine[number]
            x = addmm(offset, torch.cat((half, other), 1), matrix)
        if context.centre is not None and context.log_scale is not None:
            x = x * torch.exp(context.log_scale) + context.centre
        return x * self.data_std
