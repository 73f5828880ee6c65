"""Records of expert choices: payloads of engines, padding, packed sequences, and what is refused.

References: numpy and the layouts as vLLM, SGLang and verifiers document them, written out here a second time. Not
covered: payloads of running engines.
"""

import base64
import doctest
import io

import numpy as np
import pytest
import torch

from ornith_moe import routing_records
from ornith_moe.routing_records import Trace, check, decode, encode, expert_load, pack, unpack

LAYERS, TOP_K = 3, 2


def some(tokens, seed=0):
    return np.random.default_rng(seed).integers(0, 300, (tokens, LAYERS, TOP_K))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


class TestDecode:
    @pytest.mark.parametrize(
        "form",
        [
            lambda ids: ids,
            lambda ids: ids.tolist(),
            lambda ids: torch.tensor(ids),
            lambda ids: npy(ids.astype(np.int16)),
            lambda ids: npy(ids.astype(">i4")),
            lambda ids: {"data": ids.astype(np.int16).tobytes(), "shape": list(ids.shape)},
            lambda ids: {"data": base64.b64encode(ids.astype(np.int32).tobytes()).decode(), "shape": ids.shape},
        ],
        ids=["array", "lists", "tensor", "npy", "npy-other-order", "bytes", "base64"],
    )
    def test_forms_that_carry_their_shape(self, form):
        ids = some(5)
        assert decode(form(ids)).tolist() == ids.tolist()
        assert decode(form(ids)).dtype == torch.int16

    def test_sglang_needs_the_shape(self):
        ids = some(5)
        text = base64.b64encode(ids.astype(np.int32).tobytes()).decode()
        assert decode(text, layers=LAYERS, top_k=TOP_K).tolist() == ids.tolist()
        with pytest.raises(ValueError, match="give layers and top_k"):
            decode(text)
        with pytest.raises(ValueError, match=r"120 bytes do not make ids of shape \[-1, 4, 2\]"):
            decode(text, layers=4, top_k=TOP_K)

    def test_one_byte_per_id(self):
        ids = some(4) % 256
        assert decode({"data": ids.astype(np.uint8).tobytes(), "shape": ids.shape}).tolist() == ids.tolist()

    def test_encode_is_the_inverse(self):
        ids = torch.tensor(some(7)).short()
        assert torch.equal(decode(encode(ids)), ids)
        assert torch.equal(decode(encode(ids[:0])), ids[:0])

    def test_nothing_pickled_is_loaded(self):
        file = io.BytesIO()
        np.save(file, np.array([[[print]]], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"expected a .npy file of integers"):
            decode(base64.b64encode(file.getvalue()).decode())

    def test_a_header_that_promises_too_much_allocates_nothing(self):
        data = base64.b64decode(npy(some(5).astype(np.int16)))
        text = base64.b64encode(data.replace(b"(5, 3, 2)", b"(1" + b"0" * 13 + b", 3, 2)")[:128]).decode()
        with pytest.raises(ValueError, match="payload: "):
            decode(text)

    @pytest.mark.parametrize(
        ("payload", "error", "says"),
        [
            (some(5)[0], ValueError, r"expected shape \[tokens, layers, top_k\], got \[3, 2\]"),
            (some(5) * 1.0, TypeError, "expected integers, got float64"),
            (some(5) + 40000, ValueError, "expected ids from -1 to 32767"),
            (some(5) - 400, ValueError, "expected ids from -1 to 32767"),
            ("not base64!", ValueError, "expected base64 text"),
            (base64.b64encode(b"\x93NUMPY\x01\x00").decode(), ValueError, r"expected a \.npy file of version 1\.0"),
            ({"data": b"12345", "shape": [1, 3, 2]}, ValueError, r"5 bytes do not make ids of shape \[1, 3, 2\]"),
            ({"shape": [1, 3, 2]}, ValueError, "expected {'data'"),
        ],
        ids=str,
    )
    def test_refuses(self, payload, error, says):
        with pytest.raises(error, match=says):
            decode(payload)


class TestPack:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side):
        lengths, width = (4, 6, 1), 6
        mask = torch.zeros(3, width, dtype=torch.int64)
        for row, length in zip(mask, lengths, strict=True):
            row[width - length :] = 1
            if side == "right":
                row.copy_(row.flip(0))
        records = [some(n, seed=n) for n in lengths]
        rows = pack(records, attention_mask=mask).view(3, width, LAYERS, TOP_K)
        for row, real, record in zip(rows, mask, records, strict=True):
            assert row[real == 1].tolist() == record.tolist()
            assert (row[real == 0] == -1).all()
        back = unpack(rows.flatten(0, 1), attention_mask=mask)
        assert [record.tolist() for record in back] == [record.tolist() for record in records]

    def test_the_last_token_may_be_missing_and_the_prompt_may_come_apart(self):
        record = some(7)
        rows = pack([(record[:4], npy(record[4:]))], attention_mask=torch.ones(1, 8))
        assert rows[:7].tolist() == record.tolist() and (rows[7] == -1).all()
        with_empty_part = pack([(record, [])], attention_mask=torch.ones(1, 7))
        assert with_empty_part.tolist() == record.tolist()

    def test_packed_sequences(self):
        positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
        records = [some(3, 1), None, some(3, 2)]
        rows = pack(records, position_ids=positions)
        assert rows[:3].tolist() == records[0].tolist() and rows[4:7].tolist() == records[2].tolist()
        assert (rows[3] == -1).all() and (rows[7] == -1).all()
        assert [len(part) for part in unpack(rows, position_ids=positions)] == [3, 1, 4]

    def test_packed_sequences_with_padding_at_the_end(self):
        positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
        rows = pack([some(3), some(2)], position_ids=positions, attention_mask=mask)
        assert (rows[5:] == -1).all() and (rows[:5] >= 0).all()

    @pytest.mark.parametrize(
        ("records", "options", "says"),
        [
            ([some(5)], {"attention_mask": torch.ones(1, 7)}, r"records\[0\]: expected 7 rows .* or one less"),
            ([some(8)], {"attention_mask": torch.ones(1, 7)}, "got 8; fill gaps with rows of -1"),
            ([some(7)], {"attention_mask": torch.ones(2, 7)}, "expected one per sequence, 2 in this batch, got 1"),
            ([None], {"attention_mask": torch.ones(1, 7)}, "got none"),
            (
                [some(7), some(7)[:, :2]],
                {"attention_mask": torch.ones(2, 7)},
                r"expected one \[layers, top_k\] for all sequences, got \[\(2, 2\), \(3, 2\)\]",
            ),
            ([some(2)], {"attention_mask": torch.tensor([[1, 0, 1]])}, "expected one run of ones"),
            ([some(2)], {"position_ids": torch.tensor([[1, 2]])}, "expected 0 at the first token"),
            ([some(2)], {"attention_mask": torch.ones(2)}, r"expected shape \[B, S\]"),
            ([some(2)], {}, "expected one of them, got neither"),
        ],
        ids=str,
    )
    def test_refuses(self, records, options, says):
        with pytest.raises(ValueError, match=says):
            pack(records, **options)

    def test_unpack_refuses_another_batch(self):
        with pytest.raises(ValueError, match="rows: expected 7, one per position of the batch, got 6"):
            unpack(torch.zeros(6, 1, 1), attention_mask=torch.ones(1, 7))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0, 9], r"r\[1, 2, 1\]: expected an expert id in \[0, 9\).*got \[0, 9\]"),
        ([-2, 3], r"r\[1, 2, 0\]: expected an expert id"),
        ([3, -1], r"r\[1, 2, 1\]: expected an expert id in \[0, 9\), or -1 in the whole row"),
        ([4, 4], r"r\[1, 2\]: expected 2 different experts, got \[4, 4\]"),
    ],
    ids=str,
)
def test_check_names_the_first_bad_row(row, says):
    ids = torch.tensor([[[0, 1]] * 3] * 4)
    ids[3], ids[2, 1] = -1, torch.tensor([8, 0])
    check(ids, 9)
    ids[1, 2] = torch.tensor(row)
    with pytest.raises(ValueError, match=says):
        check(ids, 9, "r")


def test_load_counts_what_is_there():
    ids = torch.tensor([[[0, 2], [1, 2]], [[2, 0], [-1, -1]]], dtype=torch.int16)
    assert expert_load(ids, 4).tolist() == [[2, 0, 2, 0], [0, 1, 1, 0]]
    assert Trace(("a", "b"), 4, {0: ids, "x": ids[:1]}).load().tolist() == [[3, 0, 3, 0], [0, 2, 2, 0]]


def test_docstrings_run():
    ran = doctest.testmod(routing_records, extraglobs={"torch": torch})
    assert ran.attempted >= 3 and not ran.failed


def test_a_trace_that_was_interrupted_says_so():
    trace = Trace(("a", "b"), 4)
    trace.add(0, 0, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"trace\[0\]: b recorded nothing"):
        trace[0]
    with pytest.raises(ValueError, match=r"trace\[0\]: a is recorded already"):
        trace.add(0, 0, torch.tensor([[0, 1]]))
