"""Options of the verb ``plan`` beside those of ``fit``."""

from __future__ import annotations

from dataclasses import dataclass

from dora_lightning.messages import check_real, check_whole


@dataclass
class PlanOptions:
    """Options of ``plan`` beside those of ``fit``.

    Args:
        gpus: devices to plan for, 1 to 1024; by default those that the config's trainer asks for, or 1.
        memory: GiB of each; by default the device's.
        device: A100, H100, H200, L40S or RTX4090: its published bf16 peak, memory and bandwidth.
        peak: TFLOPS of each, in place of the device's.
        bandwidth: GB/s at which a device receives gathered weights, in place of the device's.
        utilization: share of the peak that the operations of a step reach, above 0 to 1.
        shape: a LLaMA's name in place of the config's model (llama-7b, llama-13b, llama2-7b, llama2-13b, llama2-70b,
            llama3-8b, llama3-70b, llama3-405b, smollm2-135m), for which nothing is loaded.
        tokens: tokens in a row; by default the config's packing_len or cutoff_len.
        mean_tokens: tokens of a sample on average, for the time; by default every sample is as long as a row.
        batch_size: samples in a device's batch; by default the config's.
        supervised: share of positions that are supervised, 0 to 1; 1 unless you know better.
        samples: samples to train on, where neither the config nor its files tell.
        reserve: GiB to leave for the device's context, communication and fragmentation.
        json: file to write the plan to.
    """

    gpus: int | None = None
    memory: float | None = None
    device: str = "H100"
    peak: float | None = None
    bandwidth: float | None = None
    utilization: float = 0.4
    shape: str | None = None
    tokens: int | None = None
    mean_tokens: float | None = None
    batch_size: int | None = None
    supervised: float = 1.0
    samples: int | None = None
    reserve: float = 2.0
    json: str | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: one is out of range.
        """
        check_whole(1, most=1024, none="the trainer's", gpus=self.gpus)
        # the first token of a row is never predicted
        check_whole(2, none="the config's", tokens=self.tokens)
        check_whole(1, none="the config's", batch_size=self.batch_size, samples=self.samples)
        check_real(above=0, none="the device's", memory=self.memory, peak=self.peak, bandwidth=self.bandwidth)
        check_real(above=0, none="as long as a row", mean_tokens=self.mean_tokens)
        check_real(above=0, most=1, utilization=self.utilization)
        check_real(0, most=1, supervised=self.supervised)
        check_real(0, reserve=self.reserve)
