# SPDX-License-Identifier: Apache-2.0
"""The table: what can be replaced, in the order in which it is looked for."""

from mmkernels.hf import generation, patch_embed, pools, positions, projector, shuffle
from mmkernels.hf.row import Row

ROWS = (
    Row("patch_embed", patch_embed.embeddings),
    Row("patch_embed", patch_embed.convolution),
    Row("projector", projector.qformer, within="crossattention"),  # self-attention looks the same
    Row("projector", projector.attention_pool),
    Row("projector", pools.attentional_pooler),
    # the blocks' attention too has k_x
    Row("projector", pools.separate_inputs, within="attn_pool"),
    Row("projector", pools.latent_pool),
    Row("projector", projector.perceiver),
    Row("projector", projector.flamingo),
    Row("projector", projector.open_flamingo),
    Row("projector", projector.aria),
    Row("projector", shuffle.pixel_shuffle),
    Row("projector", shuffle.unfolded),
    Row("positions", positions.rope_index),
    Row("cache", generation.pages),
)
