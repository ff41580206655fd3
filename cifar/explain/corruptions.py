"""Fifteen corruptions of pictures, each at five severities, after CIFAR-10-C (arXiv 1903.12261).

Made here, offline: these are not the published files. Parameters are those that CIFAR-10-C gives for 32x32 pictures,
except where KINDS says why not. A corrupted picture depends on its kind, the severity, the picture, its position in the
test set and a seed, and on nothing else: not on its batch, thread or process. At all severities of a kind a picture
gets the same random numbers, so that these differ in strength alone.

A new kind is one more entry of KINDS. Albumentations has transforms of most of these names, but they mean something
else (whole radii, fog made of circles, noise in linear light), or cost a hundred times as much (zoom).
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from cifar.explain.findings import Float, Int64, UInt8

SEVERITIES = 5


class Random:
    """Random numbers for each test image, independent of the images that are drawn with it."""

    def __init__(self, kind: str, indices: Int64, seed: int) -> None:
        # Keyed by name: adding a corruption does not change the others.
        self.key = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(kind.encode()),))
        self.indices, self.draws = indices, 0

    def normal(self, *shape: int) -> Float:
        """Draws [n, *shape], with mean 0 and standard deviation 1."""
        return np.stack([generator.standard_normal(shape, np.float32) for generator in self._of_each()])

    def uniform(self, *shape: int) -> Float:
        """Draws [n, *shape], from 0 to 1."""
        return np.stack([generator.random(shape, np.float32) for generator in self._of_each()])

    def poisson(self, rates: Float) -> Float:
        """Draws [n, ...] of the same shape as the rates [n, ...]."""
        pairs = zip(self._of_each(), rates, strict=True)
        return np.stack([generator.poisson(rate).astype(np.float32) for generator, rate in pairs])

    def _of_each(self) -> Iterator[np.random.Generator]:
        """Yields a generator for each image, to be used before the next is asked for.

        It is the same one, which counts from another place: a new one for each image takes ten times as long.
        """
        self.draws += 1
        philox = np.random.Philox(self.key)
        generator, state = np.random.Generator(philox), philox.state
        for index in self.indices.tolist():
            state["state"]["counter"] = np.array([0, 0, self.draws, index], np.uint64)
            philox.state = state
            yield generator


class Kind(NamedTuple):
    """How pictures float32 [n, side, side, 3], from 0 to 1, are corrupted; clipped and rounded afterwards."""

    corruption: Callable[[Float, Any, Random], Float]
    levels: tuple[Any, Any, Any, Any, Any]  # what each severity passes to it


def corrupt(kind: str, severity: int, pictures: UInt8, indices: Int64, seed: int) -> UInt8:
    """Corrupts the pictures [n, side, side, 3], which have the positions `indices` [n] in the test set.

    `kind` is one of KINDS, `severity` 1 to SEVERITIES.
    """
    corruption, levels = KINDS[kind]
    corrupted = corruption(
        pictures.astype(np.float32) / np.float32(255), levels[severity - 1], Random(kind, indices, seed)
    )
    return _bytes(corrupted)


# ---- noise


def gaussian_noise(pictures: Float, deviation: float, random: Random) -> Float:
    """Adds noise as in a camera in low light."""
    return pictures + np.float32(deviation) * random.normal(*pictures.shape[1:])


def shot_noise(pictures: Float, photons: float, random: Random) -> Float:
    """Applies Poisson noise, with `photons` expected at white."""
    return random.poisson(pictures * np.float32(photons)) / np.float32(photons)


def impulse_noise(pictures: Float, part: float, random: Random) -> Float:
    """Adds salt and pepper: this part of all values becomes 0 or 1."""
    drawn = random.uniform(*pictures.shape[1:])
    return np.where(drawn < part / 2, 0, np.where(drawn >= 1 - part / 2, 1, pictures)).astype(np.float32)


# ---- blur


def defocus_blur(pictures: Float, level: tuple[float, float], _random: Random) -> Float:
    """Convolves with a disk of this radius, whose edge is softened with this deviation."""
    radius, soft = level
    across = np.arange(-3, 4)
    disk = (np.hypot(across, across[:, None]) <= radius).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (3, 3), soft)
    return _each(pictures, lambda picture: cv2.filter2D(picture, -1, kernel))


def glass_blur(pictures: Float, level: tuple[float, int], random: Random) -> Float:
    """Blurs; then each pixel takes the colour of one up to a pixel above and left of it; then blurs again.

    As in the published files: their program means to swap two pixels, and copies one.
    """
    deviation, times = level
    side, corrupted = pictures.shape[1], _gaussian_blur(pictures, deviation)
    rows, columns = np.mgrid[2:side, 2:side]
    image = np.arange(len(pictures))[:, None, None]
    for up, left in (random.uniform(2, times, *rows.shape) < 0.5).transpose(2, 1, 0, 3, 4):
        corrupted[:, 2:, 2:] = corrupted[image, rows - up, columns - left]
    return _gaussian_blur(corrupted, deviation)


def motion_blur(pictures: Float, level: tuple[int, float], random: Random) -> Float:
    """Applies motion blur to one side, in a random direction within 45 degrees of horizontal."""
    angles = np.pi / 2 * (random.uniform() - 0.5)
    return _smeared(pictures, *level, angles)


def zoom_blur(pictures: Float, farthest: float, _random: Random) -> Float:
    """Returns the mean of the picture and of ever larger parts of what it shows, in steps of a hundredth."""
    middle = (pictures.shape[1] - 1) / 2
    factors = np.arange(1, farthest, 0.01)  # as the published program; rounding may add one beyond the last
    maps = [cv2.getRotationMatrix2D((middle, middle), 0, factor) for factor in factors]

    def zoomed(picture: Float) -> Float:
        size = picture.shape[:2]
        return picture + sum(cv2.warpAffine(picture, map_, size, borderMode=cv2.BORDER_REPLICATE) for map_ in maps)

    return _each(pictures, zoomed) / np.float32(len(factors) + 1)


# ---- weather


class Snow(NamedTuple):
    """Parameters of the flakes: Gaussian noise, enlarged, thresholded and motion-blurred downwards."""

    mean: float
    deviation: float
    enlarged: float
    threshold: float
    length: int
    smeared: float
    light: float  # the part of the picture that is not whitened


def snow(pictures: Float, level: Snow, random: Random) -> Float:
    """Puts motion-blurred flakes over a whitened picture."""
    side = pictures.shape[1]
    noise = np.float32(level.mean) + np.float32(level.deviation) * random.normal(side, side)
    part = np.ceil(side / level.enlarged).astype(int)
    begin = (side - part) // 2
    crops = noise[:, begin : begin + part, begin : begin + part]
    flakes = _each(crops, lambda crop: cv2.resize(crop, (side, side), interpolation=cv2.INTER_LINEAR))
    flakes = np.where(flakes < level.threshold, 0, flakes.clip(0, 1)).astype(np.float32)
    flakes = _smeared(flakes, level.length, level.smeared, -np.pi / 2 * (random.uniform() + 0.5))
    flakes = flakes + flakes[:, ::-1, ::-1]
    grey = pictures @ np.array([0.299, 0.587, 0.114], np.float32)
    white = np.maximum(pictures, (1.5 * grey + 0.5)[..., None])
    light = np.float32(level.light)
    snowy: Float = light * pictures + (1 - light) * white + flakes[..., None]
    return snowy


def frost(pictures: Float, opacity: float, random: Random) -> Float:
    """Adds frost as on a window: this opacity at its crystals, and less between them.

    The published files blend photographs of frost; here crystals are the ridges between two clouds.
    """
    side = pictures.shape[1]
    ridges = 1 - 4 * np.abs(_clouds(random, side, 1.4) - _clouds(random, side, 1.4))
    cover = np.float32(opacity) * (0.4 + 0.6 * ridges.clip(0, 1))[..., None]
    frosted: Float = pictures + cover * (np.array([0.82, 0.91, 0.96], np.float32) - pictures)
    return frosted


def fog(pictures: Float, level: tuple[float, float], random: Random) -> Float:
    """Adds fractal-noise fog of this thickness; the greater `fading`, the weaker the finer details."""
    thickness, fading = level
    brightest = pictures.max(axis=(1, 2, 3), keepdims=True)
    thick = np.float32(thickness)
    clouds = thick * _clouds(random, pictures.shape[1], fading)[..., None]
    foggy: Float = (pictures + clouds) * brightest / (brightest + thick)
    return foggy


def brightness(pictures: Float, more: float, _random: Random) -> Float:
    """Raises the value (V of HSV) by `more`."""
    value = pictures.max(axis=3, keepdims=True)
    raised = np.minimum(value + np.float32(more), 1)
    brighter: Float = np.where(value > 0, pictures * (raised / np.maximum(value, np.float32(1e-6))), raised)
    return brighter


# ---- digital


def contrast(pictures: Float, part: float, _random: Random) -> Float:
    """Scales the distance of each value from its channel's mean by `part`."""
    mean = pictures.mean(axis=(1, 2), keepdims=True)
    paler: Float = (pictures - mean) * np.float32(part) + mean
    return paler


def elastic_transform(pictures: Float, level: tuple[float, float, float], random: Random) -> Float:
    """Applies a random affine transform, then a smooth random displacement.

    The former moves three points by up to `stretch` pixels.
    """
    strength, smoothness, stretch = level
    side = pictures.shape[1]
    low, high = side // 2 - side // 3, side // 2 + side // 3
    corners = np.array([(high, high), (high, low), (low, low)], np.float32)
    moved = corners + np.float32(stretch) * (2 * random.uniform(3, 2) - 1)
    fields = 2 * random.uniform(2, side, side) - 1
    down, across = np.mgrid[:side, :side].astype(np.float32)

    def stretched(picture: Float, to: Float, field: Float) -> Any:
        whole = cv2.warpAffine(
            picture, cv2.getAffineTransform(corners, to), (side, side), borderMode=cv2.BORDER_REFLECT_101
        )
        if not strength:
            return whole
        further = [np.float32(strength) * _blurred(part, smoothness, 3) for part in field]
        return cv2.remap(whole, across + further[1], down + further[0], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)

    return np.stack([stretched(*each) for each in zip(pictures, moved, fields, strict=True)])


def pixelate(pictures: Float, part: float, _random: Random) -> Float:
    """Downscales a picture to this part of its side, and enlarges it again."""
    side, box = pictures.shape[1], Image.Resampling.BOX
    fewer = int(side * part)

    def coarse(pixels: UInt8) -> UInt8:
        return np.asarray(Image.fromarray(pixels).resize((fewer, fewer), box).resize((side, side), box))

    return _each_as_bytes(pictures, coarse)


def jpeg_compression(pictures: Float, quality: int, _random: Random) -> Float:
    """Stores a picture as a JPEG of this quality."""

    def stored(pixels: UInt8) -> Any:
        _, content = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])  # BGR
        decoded: Any = cv2.imdecode(content, cv2.IMREAD_COLOR)
        return decoded[..., ::-1]

    return _each_as_bytes(pictures, stored)


# ---- what several kinds are made of


def _each(pictures: Float, change: Callable[[Float], Any]) -> Float:
    return np.stack([change(picture) for picture in pictures])


def _each_as_bytes(pictures: Float, change: Callable[[UInt8], Any]) -> Float:
    changed: Float = np.stack([change(pixels) for pixels in _bytes(pictures)]).astype(np.float32) / np.float32(255)
    return changed


def _bytes(pictures: Float) -> UInt8:
    pixels: UInt8 = np.rint(np.float32(255) * pictures.clip(0, 1)).astype(np.uint8)
    return pixels


def _gaussian_blur(pictures: Float, deviation: float) -> Float:
    return _each(pictures, lambda picture: _blurred(picture, deviation, 4))


def _blurred(values: Float, deviation: float, truncated: float) -> Any:
    """Blurs by a Gaussian that ends after so many deviations; beyond the edge is the edge."""
    reach = int(truncated * deviation + 0.5)
    return cv2.GaussianBlur(values, (2 * reach + 1,) * 2, deviation, borderType=cv2.BORDER_REPLICATE)


def _smeared(pictures: Float, length: int, deviation: float, angles: Float) -> Float:
    """Applies motion blur: a weighted sum of 2 x `length` + 1 copies, each a pixel further along its direction [n]."""
    taps = np.arange(2 * length + 1)
    weights = np.exp(-(taps**2) / (2 * deviation**2)).astype(np.float32)
    weights /= weights.sum()
    kept = weights > 1e-4
    taps, weights = taps[kept], weights[kept]
    smeared = np.empty_like(pictures)
    for number, (picture, angle) in enumerate(zip(pictures, angles, strict=True)):
        rows, columns = np.rint(taps * np.sin(angle)).astype(int), np.rint(taps * np.cos(angle)).astype(int)
        top, left = rows.min(), columns.min()
        kernel = np.zeros((rows.max() - top + 1, columns.max() - left + 1), np.float32)
        np.add.at(kernel, (rows - top, columns - left), weights)
        smeared[number] = cv2.filter2D(picture, -1, kernel, anchor=(-left, -top), borderType=cv2.BORDER_REPLICATE)
    return smeared


def _clouds(random: Random, side: int, fading: float) -> Float:
    """Returns fractal noise [n, side, side] from 0 to 1: ever finer octaves, each weaker by the square of `fading`."""
    total, weight = np.zeros((len(random.indices), side, side), np.float32), np.float32(1)
    for cells in (2, 4, 8, 16, 32):
        noise = weight * random.uniform(cells, cells)
        total += _each(noise, lambda coarse: cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC))
        weight /= np.float32(fading**2)
    total -= total.min(axis=(1, 2), keepdims=True)
    clouds: Float = total / np.maximum(total.max(axis=(1, 2), keepdims=True), 1e-6)
    return clouds


# In CIFAR-10-C's order: noise, blur, weather, digital. Levels differ from the published ones where those do not
# corrupt a picture more than the level before.
KINDS = {
    "gaussian_noise": Kind(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Kind(shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Kind(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Kind(defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    # The same five in another order, since blur hides some of the rest, and 0.3 for a 0.25 that does nothing.
    "glass_blur": Kind(glass_blur, ((0.4, 1), (0.3, 1), (0.05, 1), (0.4, 2), (0.25, 2))),
    "motion_blur": Kind(motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2.25), (9, 2.5))),  # (8, 2) is (6, 2) again
    # The published parts begin at whole pixels, and so move the picture by up to one; these keep its middle.
    "zoom_blur": Kind(zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Kind(
        snow,
        (
            Snow(0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            Snow(0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            Snow(0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            Snow(0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            Snow(0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Kind(frost, (0.2, 0.3, 0.4, 0.5, 0.6)),  # published: parts of photographs
    "fog": Kind(fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Kind(brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Kind(contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    # The stretch is 0.96 pixels throughout: published ones shrink to that, and outweigh what grows.
    "elastic_transform": Kind(
        elastic_transform, ((0, 0, 0.96), (1.6, 6.4, 0.96), (2.56, 1.92, 0.96), (3.2, 1.28, 0.96), (3.2, 0.96, 0.96))
    ),
    "pixelate": Kind(pixelate, (0.95, 0.9, 0.82, 0.72, 0.65)),  # 0.85 and 0.75 fit pictures enlarged from 8x8 too well
    "jpeg_compression": Kind(jpeg_compression, (80, 65, 58, 50, 40)),
}
