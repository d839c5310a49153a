r"""The denoiser of an iteration, and what it takes besides an image: a noise level, and the linear reconstruction."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepinv_deq.iterations.noise import broadcast, name_of_sigma


class Denoising(nn.Module):
    r"""A denoiser that may be replaced: what it takes is found out again."""

    _context = False  # for models that 0.1 saved whole

    def _set_denoiser(self, denoiser: nn.Module, sigma: float | Tensor | None, context: bool) -> None:
        if isinstance(sigma, Tensor) and not isinstance(sigma, nn.Parameter):
            self.register_buffer("sigma", sigma)
        else:
            self.sigma = sigma
        self.denoiser = denoiser
        self._context = context

    @property
    def context(self) -> bool:
        r"""Whether the denoiser also gets the linear reconstruction: it was asked for, or this denoiser always takes it."""
        return self._context or getattr(self.denoiser, "context_channels", 0) > 0

    @context.setter
    def context(self, wanted: bool) -> None:
        self._context = bool(wanted)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "denoiser" and isinstance(value, nn.Module):
            self._takes_sigma = name_of_sigma(value, self.sigma)
        super().__setattr__(name, value)

    def networks(self) -> tuple[nn.Module, ...]:
        r"""The modules that may write to their input in place, as networks that begin with ``ReLU(inplace=True)`` do.

        :return: tuple of modules; a bound map gives them copies where necessary. Default: the denoiser.
        """
        return (self.denoiser,)

    def denoise(self, x: Tensor, *context: Tensor) -> Tensor:
        r"""Apply :math:`D_\theta`, with the noise level and the context if it takes them.

        :param torch.Tensor x: image of shape ``(B, C, H, W)``.
        :param torch.Tensor context: the linear reconstruction, where ``context`` is set.
        :return: image of the same shape.
        """
        name = "sigma" if self._takes_sigma is True else self._takes_sigma  # True in models that 0.1 saved whole
        options: dict[str, Any] = {"context": context[0]} if context else {}
        if self.sigma is not None and name:
            options[name] = broadcast(self.sigma, x, self.denoiser)
        return self.denoiser(x, **options)
