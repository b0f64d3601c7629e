"""From where the data is to the reader of its layout."""

from reference_model.data.config import DataConfig
from reference_model.data.grefer import GRefer
from reference_model.data.refer import Refer


def read(config: DataConfig) -> Refer:
    """Read a data set whole: gRefCOCO's layout where its name is grefcoco, else REFER's.

    Raises:
        InputError: A file is missing or malformed, or an entry contradicts another one.
    """
    reader = GRefer if config.dataset == "grefcoco" else Refer
    return reader(config.root, config.dataset, config.split_by)
