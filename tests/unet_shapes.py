"""Configurations of small U-Nets in the shapes of public ones, with random weights to be."""

DOWN, CROSS, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
COMMON = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "norm_num_groups": 8,
    "cross_attention_dim": 24, "use_linear_projection": True,
}  # fmt: skip
XL = {
    "block_out_channels": [16, 32, 48], "attention_head_dim": [2, 4, 6],
    "down_block_types": [DOWN, CROSS, CROSS], "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
SHAPES = {
    "sd21": {
        "block_out_channels": [16, 32, 48, 48], "attention_head_dim": [2, 4, 6, 6], "layers_per_block": 2,
        "down_block_types": [CROSS, CROSS, CROSS, DOWN], "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    },
    "sdxl": XL | {"layers_per_block": 2, "transformer_layers_per_block": [1, 2, 3]},
    # distilled ones: BK-SDM-Tiny (2305.15798), without a middle; KOALA-700M (2312.04005); SSD-1B, its middle without attention
    "bk_tiny": {
        "block_out_channels": [16, 32, 48], "attention_head_dim": 2, "layers_per_block": 1, "mid_block_type": None,
        "down_block_types": [CROSS, CROSS, CROSS], "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP],
    },
    "koala": XL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 3], "mid_block_type": None},
    "ssd": XL | {
        "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 2, [2, 1]],
        "reverse_transformer_layers_per_block": [[2, 1, 3], [2, 1, 1], 1],
    },
}  # fmt: skip
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def configs_of(name, **changes):
    """part -> configuration, for `random_backbone`. changes: of the U-Net's own."""
    return {
        "unet": COMMON | SHAPES[name] | changes,
        "vae": {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4},
        "text_encoder": {"max_position_embeddings": 7},
        "scheduler": SCALED | {"prediction_type": "epsilon"},
        "tokenizer": {},
    }
