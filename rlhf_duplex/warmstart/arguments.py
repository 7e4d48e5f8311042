"""What a warm start's configuration is to TRL's `DPOTrainer`."""

from pathlib import Path

from trl import DPOConfig

from rlhf_duplex.warmstart.config import WarmstartConfig

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def trl_arguments(config: WarmstartConfig, run_dir: Path) -> DPOConfig:
    """The configuration of a warm start in TRL's words; nothing of it reports, evaluates or draws bars by itself."""
    training, optimiser = config.training, config.optimiser
    sharded = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"transformer_layer_cls_to_wrap": ["StreamingTransformerLayer"], "use_orig_params": True},
    }
    return DPOConfig(
        output_dir=str(run_dir),
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=config.device == "cpu",
        bf16=training.autocast == "bfloat16",
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.microbatch,
        per_device_eval_batch_size=training.microbatch,
        gradient_checkpointing=training.gradient_checkpointing,
        lr_scheduler_type=_SCHEDULES[optimiser.schedule],
        warmup_steps=optimiser.warmup_steps,
        max_grad_norm=optimiser.clip_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=config.checkpointing.every,
        remove_unused_columns=False,
        dataloader_pin_memory=config.device != "cpu",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        **(sharded if training.fsdp else {}),
    )
