"""The stand-in for Inception in the embedded world: the scene reader's 64 features, as an extractor of `fid_scenes`.

It has seen scenes and nothing else: its numbers compare with each other while its hash is the same, and with no FID.
"""

import json

import numpy as np

from src.embedded.reader import FEATURES, FOLDER, SIZE, load_reader, reader_hash
from src.metrics.extractors import FeatureExtractor, Pictures
from src.types import UserError


class SceneFeatures(FeatureExtractor):
    """The shipped reader on 64-pixel pictures, always on the CPU. Raises UserError where it is missing or out of date."""

    name, suffix = "scenes", "_scenes"

    def __init__(self):
        self._reader, self.hash = load_reader(), reader_hash()
        facts = json.loads((FOLDER / "reader.json").read_text())
        right, refused = facts["accuracy"], facts["rejection"]
        self.described = (
            f"scene reader {self.hash}, {FEATURES} features, no Inception: on {facts['n_held_out']} held-out renders it reads "
            f"{right['colour']:.1%} of colours, {right['shape']:.1%} of shapes, {right['floor']:.1%} of floors, and refuses "
            f"{refused['bent']:.1%} of bent shapes"
        )

    def read(self, pictures: Pictures) -> np.ndarray:
        sizes = {picture.shape[:2] for picture in pictures}
        if sizes != {(SIZE, SIZE)}:
            raise UserError(f"the extractor scenes reads {SIZE} pixels a side, got {sorted(sizes)}: take resolution={SIZE}")
        return self._reader.read(np.stack(pictures))[2]
