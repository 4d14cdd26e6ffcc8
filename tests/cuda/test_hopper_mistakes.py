"""Mistakes planted into a copy of the Hopper decode: each must be seen, the copy without one never fails."""

from __future__ import annotations

import pytest

from tests.cuda.emulator import build
from tests.cuda.test_ring import check_seen, sound_outcome

pytestmark = [pytest.mark.skipif(bool(build.why_not()), reason=build.why_not()), pytest.mark.prove]
# The file, the text that is replaced, and what replaces it; then a part of the emulator's message, "" for wrong values.
KERNEL, TILE, LAYOUT = "hopper.cuh", "hopper_tile.cuh", "launch.h"
PRODUCERS, CONSUMERS = "hopper_producers.cuh", "hopper_consumers.cuh"
SAVING, BACKWARD = "hopper_saving.cuh", "hopper_backward.cuh"
FIRST_GROUP = (
    "      multiply_block<T, 0, false>(space, parity, empty, gives && (layer > 0 || before >= 0), low, left);\n"
)
LAST_GROUP = "      multiply_block<T, 3, true>(space, parity, empty, gives, high, right);\n"
FINAL_LEFT = "      // `left` is final, and `low` is read no more.\n"
PACK_LEFT = "      if (layer + 1 < T::kHidden) pack_half<T>(left, bias, quad, low);\n"
LOAD_HIGH = "        load_half<T>(first + T::kSteps, thread, high);\n"
LOAD_LOW = "    load_half<T>(first, thread, low);\n"
GIVE_BACK = "        arrive(&space.taken[consumer]);\n"
MISTAKES = {
    "waits for one group too few": (
        [(CONSUMERS, "wait_products<1>();\n  if (gives)", "wait_products<2>();\n  if (gives)")],
        "",
    ),
    "multiplies before weights are copied": (
        [(CONSUMERS, "  wait_barrier(&space.full[kStage], parity);\n", "")],
        "a product reads shared memory that a copy still fills",
    ),
    "takes the layer's parity for the ring's": (
        [(CONSUMERS, "T::kHidden % 2 ? buffer ^ (layer & 1) : layer & 1", "layer & 1")],
        "wrong parity",
    ),
    "expects half of the bytes": (
        [
            (
                PRODUCERS,
                "arrive_and_expect(&space.full[stage], T::kBlockBytes +",
                "arrive_and_expect(&space.full[stage], 16384 +",
            )
        ],
        "a product reads shared memory that a copy still fills",
    ),
    "multiplies without wgmma.fence": ([(CONSUMERS, "  fence_operands();\n", "")], "without wgmma.fence"),
    "does not commit its products": ([(CONSUMERS, "  commit_products();\n", "")], "not committed"),
    "counts the readers of one block": (
        [(KERNEL, "cluster_size() * T::kConsumers * kWarpgroup / kWarp", "T::kConsumers * kWarpgroup / kWarp")],
        "",
    ),
    "overwrites weights before they are read": (
        [(PRODUCERS, "      wait_barrier(&space.empty[stage], parities >> stage & 1);\n", "")],
        "",
    ),
    "packs the right half under its own group": (
        [(CONSUMERS, FIRST_GROUP, f"if (layer > 0) pack_half<T>(right, bias - T::kHalf, quad, high);\n{FIRST_GROUP}")],
        "",
    ),
    "packs the left half under its own group": (
        [(CONSUMERS, LAST_GROUP + FINAL_LEFT + PACK_LEFT, PACK_LEFT + LAST_GROUP)],
        "",
    ),
    "uses barriers before they are initialized": (
        [(KERNEL, "  sync_cluster();\n  if (thread < kWarpgroup)", "  if (thread < kWarpgroup)")],
        "not initialized",
    ),
    "ends before the other block": (
        [(KERNEL, "  sync_cluster();  // no block ends", "  // no block ends")],
        "has ended",
    ),
    "gives a stage back while it is read": (
        [
            (
                CONSUMERS,
                "arrive_remote<(kStage + T::kStages - 1) % T::kStages * 8>(empty)",
                "arrive_remote<kStage * 8>(empty)",
            )
        ],
        "",
    ),
    "copies to its own block only": ([(PRODUCERS, "ranks = (1u << size) - 1", "ranks = 1u << rank")], "diverged"),
    "takes more registers than there are": (
        [
            (TILE, "kProducerRegisters = 56", "kProducerRegisters = 64"),
            (TILE, "  static_assert(kProducerRegisters +", "  static_assert(true || kProducerRegisters +"),
        ],
        "setmaxnreg",
    ),
    "reads a descriptor's neighbor": ([(CONSUMERS, "kAt + 64, true>(d, a[2]", "kAt + 96, true>(d, a[2]")], ""),
    "packs weights without the swizzle": ([(LAYOUT, "swizzled = unit % 8 ^ row % 8", "swizzled = unit % 8")], ""),
    "stores rows in the place of steps": (
        [
            (
                PRODUCERS,
                "make_uint4(made[0][0], made[1][0], made[0][1], made[1][1])",
                "make_uint4(made[0][0], made[0][1], made[1][0], made[1][1])",
            )
        ],
        "",
    ),
    "keeps one buffer of blending weights": (
        [
            (PRODUCERS, "  space.weight[buffer][consumer][r] = weight;", "  space.weight[0][consumer][r] = weight;"),
            (CONSUMERS, "  return &space.weight[buffer]", "  return &space.weight[0 * buffer]"),
        ],
        "",
    ),
    "gathers before rows are located": ([(PRODUCERS, "      sync_threads<T::kMakers>(1);\n", "")], ""),
    "gives the first layer back before it is loaded": (
        [(CONSUMERS, LOAD_HIGH + GIVE_BACK, GIVE_BACK + LOAD_HIGH)],
        "",
    ),
    "loads the first layer before it is made": (
        [
            (CONSUMERS, "  wait_barrier(&space.made[consumer], 0);\n", ""),
            (
                CONSUMERS,
                f"    wait_barrier(&space.made[consumer], buffer);\n{LOAD_LOW}    wait_products",
                f"{LOAD_LOW}    wait_products",
            ),
        ],
        "",
    ),
    "counts half of the threads that load": (
        [(KERNEL, "init_barrier(&space.taken[i], kWarpgroup)", "init_barrier(&space.taken[i], kWarpgroup / 2)")],
        "",
    ),
    "ends with products under way": (
        [(CONSUMERS, "    wait_products<0>();  // ptxas allows", "    // ptxas allows")],
        "",
    ),
}


# With 128 channels.
NARROW_MISTAKES = {
    "gives a bias back while its warp reads it": (
        [(CONSUMERS, "      __syncwarp();  // all lanes have read the bias\n", "")],
        "",
    ),
    "packs the last rows under their own group": (
        [
            (
                CONSUMERS,
                "  wait_products<0>();\n  if (!is_last) pack_half<T>(right, bias, quad, high);\n",
                "  if (!is_last) pack_half<T>(right, bias, quad, high);\n  wait_products<0>();\n",
            )
        ],
        "",
    ),
}

# In what only training runs.
PACK_RIGHT = "      if (packs) pack_half<T>(right, bias + T::kHalf, quad, high);\n"
SAVE_RIGHT = "      save_half<T, 1>(saved, high);\n"
FOURTH_GROUP = "        multiply_block<T, 3, true>(space, parity & 1, empty, gives, high, right);\n"
PACK_GRADIENTS = "      if (layer > 0) pack_gradients<T, 0>(place(layer), bits, low, from_sums(left));\n"
FINISH_LEFT = "    finish_first<T, 0>(task, backward, space, tile, bits, left);\n"
TAKEN = "    arrive(&space.taken[consumer]);\n"
TRAINING_MISTAKES = {
    "saves the right half before it is packed": (
        [(CONSUMERS, f"{PACK_RIGHT}{SAVE_RIGHT}", f"{SAVE_RIGHT}{PACK_RIGHT}")],
        "",
    ),
    "saves a lane's rows in each other's place": (
        [(SAVING, "at.rows + half * 8 * T::kWidth", "at.rows + (1 - half) * 8 * T::kWidth")],
        "",
    ),
    "saves the bits of a lane's rows in each other's place": (
        [(SAVING, "0x00020001u << (8 * half + 2 * i)", "0x00020001u << (8 * (1 - half) + 2 * i)")],
        "",
    ),
    "saves the tile after the last one": ([(SAVING, "  if (!at.exists) return;\n", "")], ""),
    "packs gradients under their own group": (
        [(BACKWARD, PACK_GRADIENTS, ""), (BACKWARD, FOURTH_GROUP, f"{PACK_GRADIENTS}{FOURTH_GROUP}")],
        "",
    ),
    "uses gradients before they are loaded": (
        [(BACKWARD, "    wait_barrier(&space.made[consumer], parity >> 4);\n", "")],
        "",
    ),
    "gives rows back before they are read": (
        [(BACKWARD, TAKEN, ""), (BACKWARD, FINISH_LEFT, f"{TAKEN}{FINISH_LEFT}")],
        "",
    ),
    "adds columns before all rows are there": (
        [(BACKWARD, "    __syncwarp();\n    float2 columns[5] = {};", "    float2 columns[5] = {};")],
        "",
    ),
    "overwrites rows before their columns are added": (
        [(BACKWARD, "pair * 64, sum);\n    __syncwarp();\n", "pair * 64, sum);\n")],
        "",
    ),
    "sums the last layer's rows before gradients are loaded": (
        [(BACKWARD, "    sync_threads<T::kMakers>(1);\n", "")],
        "",
    ),
}

# With 128 channels and more layers than the ring has stages.
NARROW_TRAINING_MISTAKES = {
    "gives the layer's bias back while its warp reads it": (
        [(CONSUMERS, "      __syncwarp();  // all lanes have read the layer's bias\n", "")],
        "",
    ),
    "multiplies a stage that is not copied": (
        [(CONSUMERS, "      if (waits) wait_barrier(&space.full[stage], parities >> stage & 1);\n", "")],
        "a product reads shared memory that a copy still fills",
    ),
    "saves bits in the other half of a word": ([(SAVING, "word * kParts + m % kParts", "word * kParts")], ""),
    "packs a layer under its own products": (
        [
            (CONSUMERS, f"{block}T::kBlockBytes, false>(a, d), wait_products<0>();",
             f"{block}T::kBlockBytes, false>(a, d);")
            for block in ("T, ", "2 * ", "3 * ")
        ],
        "",
    ),
    "never gives a stage of the backward back": (
        [(BACKWARD, "        if (gives) arrive_remote<0>(empty + stage * 8);\n", "")],
        "",
    ),
}  # fmt: skip

# As build.ring takes them.
PARTS = {"256": {"hopper": 256}, "128": {"hopper": 128}, "training": {"hopper": 256, "trains": True}}
PARTS["training-128"] = {"hopper": 128, "trains": True}
PLANTED = {"256": MISTAKES, "128": NARROW_MISTAKES, "training": TRAINING_MISTAKES}
PLANTED["training-128"] = NARROW_TRAINING_MISTAKES


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, str]:
    """The hashes of the decodes without a mistake, which no schedule changes."""
    return {part: sound_outcome(tmp_path_factory.mktemp("sound"), **kernel) for part, kernel in PARTS.items()}


@pytest.mark.parametrize(
    ("part", "patches", "message"),
    [
        pytest.param(part, *mistake, id=name.replace(" ", "-"))
        for part, mistakes in PLANTED.items()
        for name, mistake in mistakes.items()
    ],
)
def test_a_planted_mistake_is_seen(sound, tmp_path, part, patches, message):
    check_seen(tmp_path, patches, sound[part], message, **PARTS[part])
