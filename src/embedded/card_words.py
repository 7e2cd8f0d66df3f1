"""The words of an embedded backbone's model card: what all cards say, and what only one family's does.

Braces are filled in by `card.py` from recipe.json and scores.json.
"""

from dataclasses import dataclass

TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

{kind} in miniature: the stock diffusers classes, {total_m:.2f} M parameters, trained from nothing on a world
of procedural scenes, 64 x 64 pixels. ControlBench compares control adapters on it where there is no GPU: it is small
enough for one CPU core, and a caption tells it what is in a scene but never where, so that control has something to add.

{network}

Licence: Apache-2.0, weights included. It has seen no photograph and no data of third parties.

![the first {grid} held-out prompts](samples.png)

The first {grid} captions of the held-out world, none left out; {steps} steps, guidance {guidance:g}, seed {seed}.

## Use
```python
{snippet}
```
Captions list one to three things and a floor: `{caption}`.
Known words: {words}.

{use}

## Scores
Read by the scene reader (`{reader_hash}`), a network of {reader_k:.0f} k parameters that learned from renders and knows no
model. It takes things bent out of shape, and two things where one is named, for wrong. {n} captions of the held-out world,
one sample each; 95 % intervals over pictures.

{scores_table}

Real renders are the ceiling: what is missing there is the reader's own error, or hidden behind another thing. Samples
against another picture's caption are the floor: what chance alone gives.

{fid_table}

`fid_scenes` is the Frechet distance between {features} features of the scene reader, {n} pictures against {n} renders of other
scenes. It is no Inception FID, and values compare only at equal n and equal reader. No model can expect to beat the line of
the real renders. The autoencoder alone: {psnr:.1f} dB PSNR on {n} held-out renders.

## Recipe
{recipe_table}

Seed {train_seed}; {packages}. CPU seconds are of one thread.
{again}

![autoencoder](curve_vae.png)
![diffusion model](curve_backbone.png)

## Limits
- It draws these scenes only: {things}; {colours} colours, {floors} floors. Other words fall apart into letters it never saw.
- Of the shapes, {worst} is the weakest: {worst_share:.0f} % right, against {worst_ceiling:.0f} % for real renders.
- {scene_share:.0f} % of the samples are right in colours, shapes and floor, against {scene_ceiling:.0f} % of the renders.
- Sizes and poses are in the captions, but are not scored above; positions are free by design.
- Results on it say how methods compare on {sort}; what they say about a large one is open.
"""

AGAIN = {  # whose the autoencoder is -> the words below the recipe
    "first": """\
Autoencoder and diffusion model train side by side: the latent space (16 principal components of each 8 x 8 patch) is fixed
before either starts. Everything again, from nothing: `{command}`.
The other embedded backbones take over this autoencoder, with the very same weights, so that their latents compare.""",
    "shared": """\
The autoencoder is that of `{same_as}`, with the very same weights, so that the latents of the embedded backbones compare; its
column is of that training. The latent space (16 principal components of each 8 x 8 patch) was fixed before either part was
trained. Again: `{command}`; with `vae_steps={vae_steps}` a new autoencoder is trained beside it.""",
    "own": """\
Autoencoder and diffusion model train side by side: the latent space (16 principal components of each 8 x 8 patch) is fixed
before either starts. Everything again, from nothing: `{command}`.
This autoencoder is its own: its latents do not compare with those of other embedded backbones.""",
}


@dataclass(frozen=True)
class Words:
    """kind: of which large model it is a miniature; network: what was built, and what in it was not trained; use: below the
    snippet; column, learned: head of the recipe table and the trained parts, (name, how many) of equal size; sort: of what
    results on it speak.
    """

    kind: str
    network: str
    use: str
    column: str
    learned: tuple[tuple[str, int], ...]
    sort: str


WORDS = {
    "sd3_tiny": Words(
        kind="A Stable Diffusion 3",
        network="""\
Six joint blocks of width 128 over 4 x 4 image tokens and 24 text tokens, two CLIPs of two layers; rectified flow, which
predicts the velocity.""",
        use="""\
`max_sequence_length` is the number of T5 tokens. The model was trained with none. The T5 in the folder is silent (its output
is zero) and is there because the pipeline class insists on one; many of its tokens draw attention away from the caption:

{tokens_table}

Loading without `text_encoder_3=None, tokenizer_3=None` works too; then pass `max_sequence_length=1`, since the pipeline
cannot cut a T5 prompt to no token at all, and stops with an error at 0.""",
        column="transformer and two text encoders",
        learned=(("transformer", 1), ("text_encoder", 2)),
        sort="a small rectified-flow transformer",
    ),
    "pixart_tiny": Words(
        kind="A PixArt-alpha",
        network="""\
Eight blocks of width 160 over 4 x 4 image tokens with cross-attention to 24 text tokens, a T5 of two layers; predicts the
noise, over the linear schedule of 1000 steps. The second half of the output channels, the learned variance, was not trained:
it is zero, and the stock pipeline throws it away.""",
        use="""\
The pipeline pads captions to `max_sequence_length` tokens and masks the padding. {text_tokens} tokens hold the longest
caption of these scenes. The default of {default_tokens} takes {default_s:.2f} instead of {trained_s:.2f} CPU seconds a picture,
and changes no value of {padding_n} pictures by more than {apart} of 255 levels.
`use_resolution_binning=False` is needed, since the aspect ratios that the pipeline knows start at 256 pixels.
`clean_caption=False` spares a warning about packages that would clean captions from the web.""",
        column="transformer and text encoder",
        learned=(("transformer", 1), ("text_encoder", 1)),
        sort="a small diffusion transformer with cross-attention",
    ),
    "sd21_tiny": Words(
        kind="A Stable Diffusion 2.1",
        network="""\
A U-Net of 64 channels at 8 x 8 with attention and 128 channels at 4 x 4 without, a middle with attention, and a CLIP of two
layers; predicts v, over the scaled linear schedule of 1000 steps. There is no safety checker.""",
        use="""\
The tokenizer pads captions to {text_tokens} tokens, as in training.""",
        column="U-Net and text encoder",
        learned=(("unet", 1), ("text_encoder", 1)),
        sort="a small U-Net",
    ),
}
