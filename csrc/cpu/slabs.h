// Memory for the activations that a decode saves for its backward. A slab that is no longer needed is kept for the next
// step: the first touch of fresh memory costs more than the activations save.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace liif_fast {

constexpr int64_t kSlabHeader = 64;  // bytes before the first tile

// A slab for tiles of tile_bytes, 64-byte aligned. Beyond the limit it holds no tiles, and its memory is never touched.
char* take_slab(int64_t bytes, int64_t tile_bytes);
void return_slab(void* slab);

// The tiles that a slab holds; none if slab is null, or if the layout of its tiles is another one.
SavedActivations in_slab(char* slab, int64_t tile_bytes);

// The bytes that a slab's header says it holds, header included.
int64_t slab_bytes(const char* slab);

// The most memory that slabs in use and slabs kept for later take together: by default 1 GiB, or an eighth of the
// machine's memory if that is less. set_slab_limit also frees all slabs that are not in use.
int64_t slab_limit();
void set_slab_limit(int64_t bytes);

}  // namespace liif_fast
