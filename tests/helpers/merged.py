"""The weights that a merged model would have in its files."""

from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from tsdkd.stages.models.merged_weights import merged_weights


def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """As `merged_weights`, under the names of the model's files, each tied weight once."""
    tied = set(model.all_tied_weights_keys or ())
    merged = {name: value for name, value in merged_weights(model).items() if name not in tied}
    return dict(revert_weight_conversion(model, merged))
