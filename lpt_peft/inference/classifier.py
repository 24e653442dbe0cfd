"""Classifier: a trained model with its labels, preprocessing and temperature.

Not here: loading (`lpt_peft.inference.source`), reading of images (`lpt_peft.inference.read_batches`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lpt_peft._numbers import checked_integer
from lpt_peft._numerics import at_least_float32
from lpt_peft.data.transforms import ImageTransform, transforms
from lpt_peft.data.workers import choose_workers
from lpt_peft.errors import StateError
from lpt_peft.inference.items import ItemPreparer, single_images
from lpt_peft.inference.prediction import Prediction
from lpt_peft.inference.read_batches import ReadBatch, read_batches
from lpt_peft.inference.source import Model, Source, load_model

SHOW = 5
"""Classes of a prediction, unless `show` is given."""


class Classifier:
    """Predicts classes of images with a trained model.

    Images are paths, the bytes of image files, PIL images, uint8 arrays (H, W, 3) or tensors (3, H, W). All of them are
    preprocessed as in the training, except floating point tensors, which must be preprocessed by `transform`.

    An image that cannot be read, such as a damaged file, does not stop a call: the `error` of its prediction says why.
    An object of another type or shape is an error.

    A classifier has no state between calls, and several threads can call it.

    Args:
        model: `LongTailPromptAdapter` or `ViTClassifier`, in eval mode.
        batch_size: Images of a forward pass.
        num_workers: Processes that read images; 0 reads in this process, None chooses: the number of cores, at most 8,
            and 0 for fewer than 256 images.

    Attributes:
        model: The model, the same object.
        label_names: Names of the classes, (C,) str; their numbers if the file does not name them.
        transform: From a PIL image to the model's input (3, h, w) float32.
        temperature: Divisor of the logits; None if the training had no validation split to fit it on, and then
            probabilities are not calibrated.
        batch_size: Images of a forward pass.
        num_workers: Processes that read images.

    Raises:
        ConfigError: A number is out of range, or the model's images are not RGB.

    Example:
        >>> import timm
        >>> from PIL import Image
        >>> from lpt_peft import LongTailPromptAdapter
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> classifier = Classifier(LongTailPromptAdapter.wrap(vit, num_classes=3))
        >>> [prediction] = classifier(Image.new("RGB", (50, 40)))
        >>> len(prediction.labels), round(sum(prediction.probabilities), 4)
        (3, 1.0)
    """

    def __init__(self, model: Model, *, batch_size: int = 64, num_workers: int | None = 0) -> None:
        self.model = model
        self.batch_size = checked_integer("batch_size", batch_size, 1)
        self.num_workers = None if num_workers is None else checked_integer("num_workers", num_workers, 0)
        preprocess = model.preprocess()
        self.transform: ImageTransform = transforms(preprocess, train=False)
        _, height, width = preprocess["input_size"]
        self._size = (height, width)
        self._normalizes = min(preprocess["mean"]) > 0  # a black pixel is negative
        names = model.metadata.label_names
        self.label_names = names or tuple(map(str, range(len(model.head.weight))))
        self.temperature = model.metadata.temperature

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        vit: nn.Module | None = None,
        *,
        batch_size: int = 64,
        num_workers: int | None = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        check_backbone: Literal["error", "warn", "off"] = "error",
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Classifier:
        """Load a trained model.

        Args:
            source: Output folder of `lpt-peft train`; a prompt file or model file, or its folder; or "owner/name" of a
                prompt file on the Hub, if no such folder exists.
            vit: The ViT of the training, not wrapped; None builds it, see `lpt_peft.inference.source.load_model`.
            batch_size: Images of a forward pass.
            num_workers: Processes that read images, see the class.
            device: Device of the model. None: that of `vit`; without it, the accelerator if there is any, or the CPU.
            dtype: Cast the ViT's weights to float32, bfloat16 or float16; prompts and head keep their dtype. None: the
                dtype in which a run was trained, or that of `vit`.
            check_backbone: As in `LongTailPromptAdapter.from_pretrained`, for prompt files.
            revision: Branch, tag or commit of a repository.
            subfolder: Folder inside the folder or repository.
            token: True or None for the token of the login, False for none, or the token itself.
            cache_dir: Cache of the Hub client; None is its default.
            local_files_only: Load a repository from the cache without a request to the Hub.
            force_download: Download a repository again.

        Raises:
            PromptFileError, ModelFileError: The file is missing, is refused, or is for another backbone.
            HubError: The Hub did not deliver the prompts or the backbone.
            StateError: The run has not written its result yet.
            BackboneError: The ViT cannot take prompts, or its weights are not available.
            ConfigError: An argument is out of range, or the backbone cannot be built.

        Example:
            >>> import tempfile, timm
            >>> from PIL import Image
            >>> from lpt_peft import LongTailPromptAdapter
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
            >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     adapter.save_pretrained(folder, label_names=["cat", "dog"])
            ...     classifier = Classifier.from_pretrained(folder, adapter.unwrap())
            >>> classifier(Image.new("RGB", (50, 40)))[0].label_name in {"cat", "dog"}
            True
        """
        model = load_model(
            source,
            vit,
            device=device,
            dtype=dtype,
            check_backbone=check_backbone,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls(model, batch_size=batch_size, num_workers=num_workers)

    @property
    def num_classes(self) -> int:
        """Number of classes `C`."""
        return len(self.label_names)

    @property
    def device(self) -> torch.device:
        """Device of the model's head, on which it computes."""
        return self.model.head.weight.device

    def __call__(self, images: Any, *, show: int | None = None) -> list[Prediction]:
        """Predict the classes of images.

        Args:
            images: An image, or an iterable of images; an array (N, H, W, 3) or a tensor (N, 3, H, W) is a batch.
            show: Classes of each prediction, the most probable first; None: 5, or all of fewer.

        Returns:
            A prediction for each image, in order; of a single image, a list with its prediction.

        Raises:
            InputError: An image has another type or shape.
            ConfigError: `show` is out of range.
            StateError: The model is in training mode, its logits are not finite, or a worker process was killed.
        """
        return list(self.stream(images, show=show))

    def stream(self, images: Any, *, show: int | None = None) -> Generator[Prediction, None, None]:
        """Predict the classes of images while they are read, for iterables of any length.

        With `w` workers, at most `3 w + 2` batches of images are in memory, and as many images are taken from the
        iterable before the first prediction. Close the generator to stop the workers before its end.

        Args:
            images: As in a call.
            show: As in a call.

        Yields:
            A prediction for each image, in order.

        Raises:
            InputError, ConfigError, StateError: As in a call; an InputError after the predictions of the images before.

        Example:
            >>> import timm, torch
            >>> from lpt_peft import LongTailPromptAdapter
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
            >>> classifier = Classifier(LongTailPromptAdapter.wrap(vit, num_classes=3))
            >>> endless = iter(lambda: torch.zeros(3, 40, 50, dtype=torch.uint8), None)
            >>> next(classifier.stream(endless)).image
            'image 0'
        """
        if show is None:
            show = min(SHOW, self.num_classes)
        show = checked_integer("show", show, 1, self.num_classes)
        if self.model.training:
            raise StateError("The model is in training mode, in which predictions are random: call model.eval().")
        images = single_images(images)
        return self._stream(images, show, self._workers(images))

    def _workers(self, images: Iterable[Any]) -> int:
        if self.num_workers is not None:
            return self.num_workers
        size = len(images) if isinstance(images, Sized) else None
        return choose_workers(size, lambda: 4 * 3 * self._size[0] * self._size[1] * self.batch_size)

    def _stream(self, images: Iterable[Any], show: int, workers: int) -> Generator[Prediction, None, None]:
        batches = read_batches(
            images,
            ItemPreparer(self._size, self.transform.reading, warn=self._normalizes),
            self.transform,
            batch_size=self.batch_size,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        with closing(batches):
            for batch in batches:
                yield from self._predictions(batch, show)

    def _predictions(self, batch: ReadBatch, show: int) -> Iterator[Prediction]:
        readable = [name for name, error in zip(batch.names, batch.errors, strict=True) if error is None]
        read = iter(() if batch.pixels is None else self._classify(readable, batch.pixels, show))
        for name, error in zip(batch.names, batch.errors, strict=True):
            if error is not None:
                yield Prediction(image=name, error=error)
                continue
            labels, probabilities, groups = next(read)
            yield Prediction(
                image=name,
                labels=tuple(labels),
                label_names=tuple(self.label_names[label] for label in labels),
                probabilities=tuple(probabilities),
                groups=tuple(groups),
            )

    @torch.no_grad()
    def _classify(
        self, names: Sequence[str], images: Tensor, show: int
    ) -> Iterator[tuple[list[int], list[float], list[int]]]:
        """Labels, probabilities and groups of each image (B, 3, h, w)."""
        weights = (weight.dtype for weight in self.model.vit.parameters() if weight.is_floating_point())
        images = images.to(self.device, next(weights, torch.float32), non_blocking=True)
        output = self.model(images, return_output=True)
        logits = at_least_float32(output.logits)
        if not all(finite := logits.isfinite().all(1).tolist()):
            raise StateError(
                f"{names[finite.index(False)]}: the logits are NaN or infinite, because the weights overflow in this "
                "dtype or are damaged. Load the model with dtype=torch.float32 or torch.bfloat16."
            )
        probabilities, labels = (logits / (self.temperature or 1.0)).softmax(1).topk(show)
        return zip(labels.tolist(), probabilities.tolist(), output.groups.tolist(), strict=True)
