"""Options of the commands, declared once: name, default, help text."""

import argparse
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from keras_moe.data.vocabulary import TOKENIZERS
from keras_moe.models.middle import GATINGS, KINDS
from keras_moe.models.presets import EXPERT_OPTIMIZERS
from keras_moe.models.translation_layers import KINDS as TRANSLATION_KINDS
from keras_moe.optimizers.factored_adam import UNTOUCHED_ROWS

DTYPES = ("float32", "float64", "mixed_bfloat16")
DECAYS = ("inverse_square_root", "cosine")
_PLACES = ("devices", "workers", "dtensor", "expert_parallel_size", "shard_vocabulary")
SIDES = ("both", "encoder", "decoder")


def _option(default, help_text, *, choices=None):
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class TrainOptions:
    """Options that the trainings share; some have a default of their own."""

    COMMAND: ClassVar[str]
    # Options that may differ when an interrupted run goes on.
    FREE: ClassVar[tuple[str, ...]] = (
        "output_dir",
        "overwrite",
        "verbose",
        "epochs",
        "baseline",
    )
    # What a run has that was begun before there were these options.
    BEFORE: ClassVar[dict[str, Any]] = {
        "activation": "sigmoid",
        "gating": "noisy_top_k",
        "noise": "learned",
        "decay": "inverse_square_root",
        "num_groups": None,
        "tokens": None,
        "mixtures": "both",
        "shared_units": 0,
        "expert_dropout": 0.0,
        "scaling_factor": 1.0,
        "expert_learning_rate": 1.0,
        "gate_learning_rate": 1.0,
        "untouched_rows": "keep",
        "num_mixtures": 1,
    }

    output_dir: str = _option("runs/model", "folder for everything written")
    num_experts: int = _option(64, "number of experts of a mixture")
    units: int = _option(128, "width of the model")
    hidden_units: int = _option(256, "hidden units of an expert")
    shared_units: int = _option(
        0, "hidden units of an expert that every token passes, beside the chosen ones"
    )
    lstm_units: int | None = _option(
        None, "LSTM cells, projected to --units; default: --units, no projection"
    )
    dropout: float = _option(0.3, "fraction of each layer's output that is dropped")
    expert_dropout: float = _option(
        0.0, "fraction of the hidden units of experts that is dropped in training"
    )
    gating: str = _option(
        "noisy_top_k",
        "gate of the mixtures: noisy top-k, the same without noise, balanced by a bias "
        "without a loss, that of Switch (k 1), or strictly balanced (appendix F)",
        choices=GATINGS,
    )
    scaling_factor: float = _option(
        1.0, "factor of all gates, which otherwise sum to 1 (all but balanced ones)"
    )
    noise: str = _option(
        "learned", "standard deviation of a noisy gate's noise, learned or a number"
    )
    num_groups: int | None = _option(
        None,
        "groups of a hierarchical mixture, --k of which a token meets; default: flat",
    )
    activation: str = _option(
        "sigmoid",
        "activation of a mixture's output, or of the dense expert's: a name of Keras, "
        "linear for none",
    )
    loss_weight: float = _option(0.1, "weight of the importance and the load loss")
    learning_rate: float = _option(0.004, "highest learning rate of Adam")
    expert_learning_rate: float = _option(
        1.0, "factor of the learning rate for the weights of experts"
    )
    gate_learning_rate: float = _option(
        1.0, "factor of the learning rate for the weights of gates"
    )
    warmup_steps: int = _option(200, "steps over which the learning rate rises")
    decay: str = _option(
        "inverse_square_root",
        "how the learning rate falls after that: with the root of the step, or as half "
        "a cosine to 0 over all --epochs",
        choices=DECAYS,
    )
    epochs: int = _option(3, "passes over the training data, at most")
    patience: int = _option(2, "epochs without a better validation before stopping")
    seed: int = _option(1, "random seed")
    baseline: bool = _option(
        False, "also train a dense model of equal operations and compare"
    )
    overwrite: bool = _option(
        False, "delete what --output-dir holds first, if it is an earlier run"
    )
    verbose: int = _option(
        1, "0 silent, 1 progress bar, 2 a line an epoch", choices=(0, 1, 2)
    )

    @property
    def noise_stddev(self) -> Any:
        """That of noisy gates."""
        return self.noise if self.noise == "learned" else float(self.noise)

    def settings(self) -> dict:
        """The options that make a run what it is; kept with its checkpoints."""
        return {k: v for k, v in asdict(self).items() if k not in self.FREE}


def _default(name, default):
    """A shared option with a default of its own."""
    return field(
        default=default, metadata=TrainOptions.__dataclass_fields__[name].metadata
    )


@dataclass(frozen=True)
class TrainLMOptions(TrainOptions):
    """Options of `train-lm`."""

    COMMAND = "train-lm"
    FREE = (*TrainOptions.FREE, *_PLACES)

    output_dir: str = _default("output_dir", "runs/language_model")
    activation: str = _default("activation", "linear")
    loss_weight: float = _default("loss_weight", 0.01)
    noise: str | None = _option(  # type: ignore[assignment]
        None,
        "standard deviation of a noisy gate's noise, learned or a number; default: 0.2, "
        "with --num-groups learned",
    )
    data_dir: str | None = _option(
        None,
        "folder with train, valid and test files (.txt, .txt.gz or .txt.xz); "
        "default: the embedded Austen corpus",
    )
    tfds: str | None = _option(
        None,
        "dataset of tensorflow-datasets, such as lm1b, prepared in --data-dir (or where "
        "that package keeps its data); default: none",
    )
    tokenizer: str | None = _option(
        None,
        "words (raw text) or whitespace (tokenized text); default: words for the "
        "embedded corpus, whitespace for --data-dir",
        choices=TOKENIZERS,
    )
    min_count: int = _option(2, "words that occur less often become <unk>")
    vocabulary_size: int | None = _option(None, "most words to know; default: all")
    tokens: int | None = _option(
        None,
        "train on so many tokens at the beginning of the text, whose words are all "
        "known; default: all",
    )
    preset: str | None = _option(
        None,
        "configuration of the paper, such as moe_256_h: its middle, groups, k, dropout "
        "and optimizer of the experts, with at most --num-experts; --units and the like "
        "are then not used",
    )
    preset_factor: int = _option(4, "divides the widths of --preset; 1 is full size")
    middle: str = _option(
        "moe",
        "what stands between the LSTMs: the mixture or a dense baseline",
        choices=KINDS,
    )
    k: int = _option(4, "experts for each token (of each group, if hierarchical)")
    num_mixtures: int = _option(
        1,
        "mixtures one after the other between the LSTMs, or dense experts in their "
        "place (without --preset)",
    )
    num_sampled: int | None = _option(
        None, "candidates of the softmax in training; default: the full softmax"
    )
    untouched_rows: str = _option(
        "decay",
        "with --num-sampled, what becomes of the rows of words that a step does not "
        "read: they decay, as in Adam, do so when they are read again (catch_up, which "
        "saves time where words are many), or stay (keep, which learns less)",
        choices=UNTOUCHED_ROWS,
    )
    batch_size: int = _option(32, "rows of a batch, each a stream of text")
    sequence_length: int = _option(32, "time steps of a batch")
    dtype: str = _option(
        "float32",
        "numbers of the model: float32, mixed_bfloat16, or float64, in which runs on "
        "one and on several devices agree to many more digits",
        choices=DTYPES,
    )
    devices: int | None = _option(
        None,
        "devices of this machine to train on, each with its share of the experts: "
        "GPUs if there are so many, else parts of the CPU; default: one",
    )
    workers: int | None = _option(
        None,
        "processes on this machine to train in, each with its share of the experts; "
        "default: one",
    )
    dtensor: int | None = _option(
        None, "as --devices, by layouts of DTensor on a mesh; default: one device"
    )
    expert_parallel_size: int | None = _option(
        None,
        "devices that share the experts out, of those of --devices or --workers, whose "
        "number it divides: each group of so many holds all experts; default: all",
    )
    shard_vocabulary: bool = _option(
        False, "share the words of embedding and softmax out among all devices"
    )

    @property
    def noise_stddev(self) -> Any:
        """That of noisy gates."""
        if self.noise is not None:
            return super().noise_stddev
        is_flat = self.gating == "noisy_top_k" and self.num_groups is None
        return 0.2 if is_flat else "learned"

    def settings(self) -> dict:
        """As of the base; what becomes of rows that are not read only if there are."""
        found = super().settings()
        if self.num_sampled is None:
            del found["untouched_rows"]
        return found


@dataclass(frozen=True)
class TrainMTOptions(TrainOptions):
    """Options of `train-mt`."""

    COMMAND = "train-mt"
    FREE = (*TrainOptions.FREE, "num_beams", "length_penalty", "test_sentences")

    output_dir: str = _default("output_dir", "runs/translation")
    num_experts: int = _default("num_experts", 32)
    units: int = _default("units", 192)
    hidden_units: int = _default("hidden_units", 384)
    dropout: float = _default("dropout", 0.1)
    loss_weight: float = _default("loss_weight", 0.01)
    warmup_steps: int = _default("warmup_steps", 400)
    data_dir: str | None = _option(
        None,
        "folder with train.en-fr.tsv, valid.en-fr.tsv, test.en-fr.tsv and so on (also "
        ".gz and .xz); default: the embedded strings of user interfaces",
    )
    tfds: str | None = _option(
        None,
        "dataset of tensorflow-datasets, such as wmt14_translate/fr-en or "
        "ted_multi_translate, prepared in --data-dir (or where that package keeps its "
        "data); default: none",
    )
    max_pairs: int | None = _option(
        None, "with --tfds, read so many rows of each split, at most; default: all"
    )
    directions: str | None = _option(
        None,
        "directions with commas between, such as en-fr,fr-en; default: both of every "
        "pair of languages with English",
    )
    vocabulary_size: int = _option(4000, "subwords of all languages together, at most")
    middle: str = _option(
        "moe",
        "what stands between the LSTMs: the mixtures, a dense expert, or nothing",
        choices=TRANSLATION_KINDS,
    )
    mixtures: str = _option(
        "both",
        "sides that have a mixture; the other has a dense expert of equal operations",
        choices=SIDES,
    )
    k: int = _option(2, "experts for each token (of each group, if hierarchical)")
    constant_steps: int = _option(0, "steps at the highest rate before it falls")
    batch_tokens: int = _option(2048, "most positions of a batch, with padding")
    max_length: int = _option(40, "pairs with more subwords on a side are left out")
    temperature: float = _option(
        1.0, "evens out the directions' shares: pairs to the power of 1/temperature"
    )
    steps_per_epoch: int | None = _option(
        None,
        "batches of an epoch, after which the model is validated and kept; epochs go "
        "through the training pairs one after another; default: all pairs",
    )
    num_beams: int = _option(4, "hypotheses of the beam search")
    length_penalty: float = _option(0.6, "exponent of the length in a beam's score")
    test_sentences: int | None = _option(
        None, "translate so many test sentences of a direction, at most; default: all"
    )


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export`."""

    run_dir: str = _option("runs/language_model", "folder of a finished training run")
    output_dir: str | None = _option(
        None, "folder of all versions; default: saved_model in the run's folder"
    )
    version: int | None = _option(
        None, "number of the new folder; default: after the largest there is"
    )
    signatures: str | None = _option(
        None, "names, separated by commas; default: all that the model has"
    )
    ids: bool = _option(False, "token ids instead of strings, for a language model")
    warmup: bool = _option(
        False, "write requests that a server runs before it takes others"
    )


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`."""

    preset: str = _option(
        "moe_131072_h",
        "configuration of the paper, such as moe_4096_h, or all for a table of all",
    )
    model: str | None = _option(
        None, "a model of yours in its place: a .keras file, compiled or not"
    )
    batch_size: int | None = _option(None, "of --model: examples of one device")
    sequence_length: int | None = _option(
        None, "of --model: length of the axes that it leaves open"
    )
    optimizer: str | None = _option(
        None, "of --model: name of an optimizer; default: that of the file, or adam"
    )
    expert_parallel_size: int | None = _option(
        None, "of --model: devices that share the experts; default: the fastest"
    )
    scaling: int | None = _option(
        None, "also simulate 1, 2, 4, ... devices, up to so many, such as 2048"
    )
    cluster: str = _option(
        "k40", "k40 (the paper's), h100, or a JSON file that describes a cluster"
    )
    num_devices: int | None = _option(
        None, "number of devices; default: that of the cluster, or of the paper's run"
    )
    batch_tokens: int | None = _option(
        None, "tokens of a batch over all devices; default: the paper's"
    )
    recompute: bool = _option(
        False,
        "compute hidden activations of experts twice, also where the paper did not",
    )
    expert_optimizer: str | None = _option(
        None,
        "optimizer of the experts; default: the paper's",
        choices=EXPERT_OPTIMIZERS,
    )
    shard_vocabulary: bool = _option(
        False, "share embedding and softmax among the devices"
    )
    output_dir: str | None = _option(
        None, "folder for plan.json and pictures; default: only print"
    )


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds the fields of a class of options to a parser."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for item in fields(options):
        keywords: dict[str, Any] = {"default": item.default}
        if isinstance(item.default, bool):
            keywords["action"] = "store_true"
        elif item.default is None:
            keywords["type"] = int if "int" in str(item.type) else str
        else:
            keywords["type"] = type(item.default)
        if item.default is None or item.default is False:
            # The text says what happens; "(default: None)" would not.
            keywords["default"] = argparse.SUPPRESS
        if item.metadata["choices"]:
            keywords["choices"] = item.metadata["choices"]
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, help=item.metadata["help"], **keywords)
