// Minimal filtering of an input that is one vector of channels for each label over large parts (what a label
// map's first layer leaves, and what this leaves in turn). A tile whose window holds one label is the same
// wherever it is: the first of each label and image is computed like any other tile, the rest are copies,
// and its statistics count for all of them.
//
// 1. The tiles of one label are found.
// 2. The others, and one of each label, are listed.
// 3. These are computed, in blocks of the list.
// 4. The rest are copied.
#pragma once

#include "cpu/winograd.h"

namespace p2pfast::P2PFAST_LEVEL {

template <class S>
struct Skipping {
  static constexpr int kSlots = 64;  // labels of an image; tiles of further ones are computed
  static constexpr uint8_t kNone = 255;

  const ConvArgs& args;
  const Winograd<S> tiling{args};
  const int64_t tiles = tiling.tiles;

  // Of one image. copies[slot]: tiles like tile list[tiles + slot], that one included.
  struct Counts {
    int32_t listed, slots, copies[kSlots];
  };
  struct Shared {
    uint8_t* label;  // of each tile, later its slot if it is to be copied
    int32_t* list;
    Counts* counts;
  };
  Shared carve(Carver& carver) const {
    auto floats = [&](int64_t bytes) { return carver.floats(ceil_div(args.images * bytes, 4)); };
    return {reinterpret_cast<uint8_t*>(floats(tiles)),
            reinterpret_cast<int32_t*>(floats((tiles + kSlots) * static_cast<int64_t>(sizeof(int32_t)))),
            reinterpret_cast<Counts*>(floats(sizeof(Counts)))};
  }
  int64_t workspace(int threads) const {
    Carver carver{nullptr};
    carve(carver);
    return carver.used + tiling.block_workspace(threads);
  }
  int64_t parts() const { return tiling.blocks() + kSlots; }

  // The label of a window that lies inside the image and holds one, else kNone.
  uint8_t window_label(const uint8_t* map, int ty, int tx) const {
    const int64_t y = static_cast<int64_t>(S::kStepIn) * ty + S::origin(args.pad_top);
    const int64_t x = static_cast<int64_t>(S::kStepIn) * tx + S::origin(args.pad_left);
    if (y < 0 || x < 0 || y + S::kWindow > args.height || x + S::kWindow > args.width) return kNone;
    const uint8_t* row = map + y * args.width + x;
    const uint8_t label = row[0];
    if (label == kNone) return kNone;
    for (int i = 0; i < S::kWindow; ++i, row += args.width) {
      int other = 0;
      for (int j = 0; j < S::kWindow; ++j) other |= row[j] ^ label;
      if (other != 0) return kNone;
    }
    return label;
  }

  void find(const Shared& shared, int64_t image, int ty) const {
    const uint8_t* map = args.uniform + image * args.height * args.width;
    uint8_t* label = shared.label + image * tiles + static_cast<int64_t>(ty) * tiling.tiles_x;
    const int y0 = ty * S::kStepOut, rows = min2(S::kStepOut, args.out_height - y0);
    for (int tx = 0; tx < tiling.tiles_x; ++tx) {
      const int x0 = tx * S::kStepOut, columns = min2(S::kStepOut, args.out_width - x0);
      const bool whole = rows == S::kStepOut && columns == S::kStepOut;
      label[tx] = whole ? window_label(map, ty, tx) : kNone;
      if (args.out_uniform == nullptr) continue;
      uint8_t* out = args.out_uniform + (image * args.out_height + y0) * args.out_width + x0;
      for (int y = 0; y < rows; ++y, out += args.out_width)
        for (int x = 0; x < columns; ++x) out[x] = label[tx];
    }
    // Only whole pixels of channels can be copied.
    if (args.out.channel_stride != 1) std::memset(label, kNone, static_cast<size_t>(tiling.tiles_x));
  }

  void list(const Shared& shared, int64_t image) const {
    uint8_t* label = shared.label + image * tiles;
    int32_t* to = shared.list + image * (tiles + kSlots);
    Counts& counts = shared.counts[image];
    std::memset(&counts, 0, sizeof(counts));
    uint8_t slot_of[256];
    std::memset(slot_of, kNone, sizeof(slot_of));
    for (int64_t t = 0; t < tiles; ++t) {
      if (label[t] == kNone) {
        to[counts.listed++] = static_cast<int32_t>(t);
        continue;
      }
      uint8_t& slot = slot_of[label[t]];
      if (slot != kNone) {
        label[t] = slot;
        ++counts.copies[slot];
        continue;
      }
      label[t] = kNone;
      if (counts.slots < kSlots) {
        slot = static_cast<uint8_t>(counts.slots++);
        counts.copies[slot] = 1;
        to[tiles + slot] = static_cast<int32_t>(t);
      } else {
        to[counts.listed++] = static_cast<int32_t>(t);
      }
    }
  }

  // Block `task` of the list; those past all blocks are the one tile of a slot.
  void compute(const Shared& shared, char* workspace, int64_t image, int64_t task) const {
    const Counts& counts = shared.counts[image];
    Winograd<S> w{args};
    w.list = shared.list + image * (tiles + kSlots);
    const int64_t slot = task - w.blocks(), part = image * parts() + task;
    const int64_t first = slot < 0 ? task * w.block_tiles() : tiles + slot;
    const int64_t count =
        slot < 0 ? min2<int64_t>(w.block_tiles(), counts.listed - first) : slot < counts.slots;
    if (count <= 0) {
      if (args.partial) args.count[part] = 0.0f;
      return;
    }
    w.run_block(workspace, image, first, static_cast<int>(count), slot < 0 ? counts.listed : 0, task,
                parts());
    if (!args.partial || slot < 0) return;
    const float copies = static_cast<float>(counts.copies[slot]);
    args.count[part] *= copies;
    const int stride = stats_stride(args);
    float* m2 = args.partial + (part * 2 + 1) * stride;
    for (int c = 0; c < tiling.out_channels; ++c) m2[c] *= copies;
  }

  void copy(const Shared& shared, int64_t image, int ty) const {
    const uint8_t* slot = shared.label + image * tiles + static_cast<int64_t>(ty) * tiling.tiles_x;
    const int32_t* first = shared.list + image * (tiles + kSlots) + tiles;
    const int64_t size = args.out.dtype == DType::kFloat32 ? 4 : 2;
    char* out = static_cast<char*>(args.out.data) + size * image * args.out.image_stride;
    const int64_t row = size * args.out.row_stride, pixel = size * args.out.pixel_stride;
    // The last pixel may have no padding lanes.
    const size_t bytes = static_cast<size_t>((S::kStepOut - 1) * pixel + size * args.out_channels);
    const bool streaming = streams(args) && args.out.pixel_stride == round_up(args.out_channels, 16);
    for (int tx = 0; tx < tiling.tiles_x; ++tx) {
      if (slot[tx] == kNone) continue;
      const int64_t from = first[slot[tx]];
      const char* source =
          out + from / tiling.tiles_x * S::kStepOut * row + from % tiling.tiles_x * S::kStepOut * pixel;
      char* to =
          out + static_cast<int64_t>(ty) * S::kStepOut * row + static_cast<int64_t>(tx) * S::kStepOut * pixel;
      for (int y = 0; y < S::kStepOut; ++y) {
        if (!streaming) {
          std::memcpy(to + y * row, source + y * row, bytes);
          continue;
        }
        // Two bfloat16 values are copied as one float.
        const float* values = reinterpret_cast<const float*>(source + y * row);
        float* line = reinterpret_cast<float*>(to + y * row);
        for (int64_t i = 0; i < S::kStepOut * pixel / 4; i += kLanes) stream(line + i, load(values + i));
      }
    }
    if (streaming) finish_streams();
  }

  void run() const {
    Carver carver{static_cast<char*>(args.workspace)};
    const Shared shared = carve(carver);
    char* const own = carver.base + carver.used;
    const int64_t share = tiling.block_workspace(1), rows = tiling.tiles_y;
    parallel_for(args.images * rows,
                 [&](int64_t task, int) { find(shared, task / rows, static_cast<int>(task % rows)); });
    parallel_for(args.images, [&](int64_t image, int) { list(shared, image); });
    parallel_for(args.images * parts(), [&](int64_t task, int worker) {
      compute(shared, own + worker * share, task / parts(), task % parts());
    });
    parallel_for(args.images * rows,
                 [&](int64_t task, int) { copy(shared, task / rows, static_cast<int>(task % rows)); });
  }
};

}  // namespace p2pfast::P2PFAST_LEVEL
