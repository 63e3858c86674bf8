import numpy as np
import pytest
import tensorflow_datasets as tfds

from zephyr_jax.data.prepare.builders import DIALOGUE, PAIR
from zephyr_jax.data.prepare.tf_example import encode, first_text

LONG = "Wörter, 单词 \n\t\x00" * 20_000


def turns(*contents):
    roles = ("system", "user", "assistant")
    return [{"role": roles[n % 3], "content": text} for n, text in enumerate(contents)]


RECORDS = {
    "dialogue": (DIALOGUE, {"prompt": "", "prompt_id": "0", "messages": turns("a", "", LONG)}),
    "many turns": (
        DIALOGUE,
        {"prompt": "é" * 127, "prompt_id": "x" * 128, "messages": turns(*map(str, range(700)))},
    ),
    "pair": (
        PAIR,
        {
            "prompt": "Why?",
            "prompt_id": "1",
            "chosen": turns("Why?", "So."),
            "rejected": turns("Why?", "No."),
            "score_chosen": 9.5,
            "score_rejected": -0.1,
            "source": "",
        },
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_bytes_mean_what_those_of_tfds_mean(name):
    features, record = RECORDS[name]
    features = tfds.features.FeaturesDict(features)
    theirs = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    serialized = theirs.serialize_example(features.encode_example(record))
    from tensorflow_datasets.proto import tf_example_pb2 as proto

    ours = proto.Example.FromString(encode(record))
    assert ours == proto.Example.FromString(serialized)
    read = features.deserialize_example_np(encode(record))
    assert read["prompt"] == record["prompt"].encode()
    key = "chosen" if "chosen" in record else "messages"
    assert [text.decode() for text in read[key]["content"]] == [m["content"] for m in record[key]]
    if "score_chosen" in record:
        assert read["score_rejected"] == np.float32(-0.1)
    assert first_text(encode(record), "prompt") == record["prompt"]
    assert first_text(encode(record), "nothing") == ""


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(UnicodeEncodeError):
        encode({"prompt": "\ud800"})
