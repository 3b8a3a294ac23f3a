// The kernels of cuda/label_conv.h and the order they run in.
//
// 1. Pooling (if any), a kernel a level: pure pixels and mixtures, a slot of entries for each pixel.
// 2. The convolution. A block loads a tile of labels with its border, turns every row of every window into a
//    word of bits (where the label changes, where an edge or a mixture is), marks the windows of one label,
//    and writes the pixels, four channels a thread: a row of a table, or a sum of rows.
#pragma once

#include "cuda/label_conv.h"
#include "cuda/numbers.h"
#include "cuda/phases.h"

namespace p2pfast::cuda {

inline constexpr int kTileHeight = 8, kTileWidth = 64;

// What a pixel of the map is, in 16 bits: its label if it is below 256, else one of these.
inline constexpr uint32_t kOutside = 0x100, kBlend = 0x200, kInvalid = 0x300;

P2PFAST_HD int lowest_bit(uint32_t v) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(v)) - 1;
#else
  return __builtin_ctz(v);
#endif
}

P2PFAST_HD int bits_set(uint32_t v) {
#ifdef __CUDA_ARCH__
  return __popc(v);
#else
  return __builtin_popcount(v);
#endif
}

P2PFAST_HD uint64_t load_integer(const void* p, int32_t bytes, int64_t i) {
  switch (bytes) {
    case 1:
      return static_cast<const uint8_t*>(p)[i];
    case 2:
      return static_cast<const uint16_t*>(p)[i];
    case 4:
      return static_cast<const uint32_t*>(p)[i];
    default:
      return static_cast<const uint64_t*>(p)[i];
  }
}

// The index that padding reads, or -1 where it reads zero (or where no output needs it).
P2PFAST_HD int64_t padded_index(int64_t i, int64_t size, bool reflect) {
  if (reflect) i = i < 0 ? -i : i < size ? i : 2 * size - 2 - i;
  return i >= 0 && i < size ? i : -1;
}

// The labels as they are given.
struct LabelSource {
  const void* labels;
  const uint8_t* edges;
  const void* ids;
  int32_t label_bytes, id_bytes, classes;
  int64_t height, width;

  P2PFAST_HD uint32_t code(int64_t n, int64_t y, int64_t x) const {
    const uint64_t label = load_integer(labels, label_bytes, (n * height + y) * width + x);
    return label < static_cast<uint64_t>(classes) ? static_cast<uint32_t>(label) : kInvalid;
  }

  P2PFAST_HD bool edge(int64_t n, int64_t y, int64_t x) const {
    const int64_t i = (n * height + y) * width + x;
    if (edges != nullptr) return edges[i] != 0;
    if (ids == nullptr) return false;
    const uint64_t id = load_integer(ids, id_bytes, i);
    return (x > 0 && load_integer(ids, id_bytes, i - 1) != id) ||
           (x + 1 < width && load_integer(ids, id_bytes, i + 1) != id) ||
           (y > 0 && load_integer(ids, id_bytes, i - width) != id) ||
           (y + 1 < height && load_integer(ids, id_bytes, i + width) != id);
  }
};

// One channel of a mixture.
struct BlendEntry {
  float weight;
  uint32_t channel;
};

// A pooled map. A pixel of one label without an edge has no entries; one of a label and an edge has one, of
// the edge channel, on top of its label; a blend's entries stand for it.
struct PooledMap {
  int64_t height, width, slots;
  uint16_t* code;
  uint16_t* entries;  // how many; kSame is added where they equal those of the pixel to the left
  BlendEntry* entry;  // [height][width][slots] an image
};
inline constexpr uint32_t kSame = 0x8000;

// Which pixel of a batch of maps is a thread's: a block has up to 256 pixels of a row. Grids have fewer than
// 2^31 blocks, so divisions of 32 bits do.
struct MapPixel {
  static constexpr int kThreads = 256;
  int64_t n, y, x, index;

  static int64_t blocks(int64_t batch, const PooledMap& map) {
    return batch * map.height * ceil_div(map.width, kThreads);
  }
  P2PFAST_HD MapPixel(const PooledMap& map, int64_t block, int thread) {
    const uint32_t across = static_cast<uint32_t>(ceil_div(map.width, kThreads));
    const uint32_t line = static_cast<uint32_t>(block) / across;
    x = int64_t{static_cast<uint32_t>(block) % across} * kThreads + thread;
    n = line / static_cast<uint32_t>(map.height);
    y = line % static_cast<uint32_t>(map.height);
    index = int64_t{line} * map.width + x;
  }
};

// Makes a pooled map from the labels or, with kDeeper, from another pooled map; a pixel a thread. The list is
// made where it stays, so it needs no local memory.
template <bool kDeeper>
struct LabelPoolKernel {
  static constexpr int kThreads = MapPixel::kThreads;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 4;

  struct Args {
    LabelSource source;
    PooledMap in, out;
    int64_t batch;
  };
  struct Shared {};
  struct Local {};

  static int64_t blocks(const Args& a) { return MapPixel::blocks(a.batch, a.out); }

  static P2PFAST_HD void add(BlendEntry* list, int& count, uint32_t channel, float weight) {
    for (int i = 0; i < count; ++i) {
      if (list[i].channel == channel) {
        list[i].weight += weight;
        return;
      }
    }
    list[count++] = {weight, channel};
  }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    const MapPixel at(a.out, block, thread);
    if (at.x >= a.out.width) return;
    const int64_t n = at.n, py = at.y, px = at.x, pixel = at.index;
    const int64_t height = kDeeper ? a.in.height : a.source.height;
    const int64_t width = kDeeper ? a.in.width : a.source.width;
    const int64_t y0 = max2<int64_t>(2 * py - 1, 0), y1 = min2(2 * py + 1, height - 1);
    const int64_t x0 = max2<int64_t>(2 * px - 1, 0), x1 = min2(2 * px + 1, width - 1);
    const uint32_t edge_channel = static_cast<uint32_t>(a.source.classes);

    const auto code_at = [&](int64_t y, int64_t x) -> uint32_t {
      if constexpr (kDeeper) return a.in.code[(n * height + y) * width + x];
      return a.source.code(n, y, x);
    };
    uint32_t code = code_at(y0, x0), edges = 0;  // a bit for each pixel
    bool mixed = code > 255, invalid = code == kInvalid;
    uint32_t bit = 1;
    for (int64_t y = y0; y <= y1; ++y)
      for (int64_t x = x0; x <= x1; ++x, bit <<= 1) {
        const uint32_t here = code_at(y, x);
        invalid |= here == kInvalid;
        mixed |= here != code;
        if constexpr (kDeeper) {
          mixed |= a.in.entries[(n * height + y) * width + x] != 0;
        } else if (a.source.edge(n, y, x)) {
          edges |= bit;
        }
      }
    if (invalid) code = kInvalid;
    int count = 0;
    if ((mixed || edges != 0) && !invalid) {
      BlendEntry* const list = a.out.entry + pixel * a.out.slots;
      float edge = static_cast<float>(bits_set(edges));
      for (int64_t y = y0; y <= y1; ++y)
        for (int64_t x = x0; x <= x1; ++x) {
          const uint32_t here = code_at(y, x);
          if (here != kBlend) add(list, count, here, 1.0f);
          if constexpr (kDeeper) {
            const int64_t i = (n * height + y) * width + x;
            const int entries = a.in.entries[i];
            for (int e = 0; e < entries; ++e) {
              const BlendEntry entry = a.in.entry[i * a.in.slots + e];
              if (entry.channel == edge_channel) {
                edge += entry.weight;
              } else {
                add(list, count, entry.channel, entry.weight);
              }
            }
          }
        }
      if (count == 1) {
        code = list[0].channel;
        count = 0;
      } else {
        code = kBlend;
      }
      if (edge != 0) list[count++] = {edge, edge_channel};
      const float pixels = static_cast<float>((y1 - y0 + 1) * (x1 - x0 + 1));
      for (int i = 0; i < count; ++i) list[i].weight /= pixels;
    }
    a.out.code[pixel] = static_cast<uint16_t>(code);
    a.out.entries[pixel] = static_cast<uint16_t>(count);
  }
};

// Adds kSame. A thread writes its own pixel and reads its left neighbour's count without the flag.
struct LabelSameKernel {
  static constexpr int kThreads = MapPixel::kThreads;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 4;

  struct Args {
    PooledMap map;
    int64_t batch;
  };
  struct Shared {};
  struct Local {};

  static int64_t blocks(const Args& a) { return MapPixel::blocks(a.batch, a.map); }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    const MapPixel at(a.map, block, thread);
    if (at.x == 0 || at.x >= a.map.width) return;
    const int64_t pixel = at.index;
    const uint32_t count = a.map.entries[pixel];
    if (count == 0 || (a.map.entries[pixel - 1] & (kSame - 1)) != count) return;
    if ((a.map.code[pixel] == kBlend) != (a.map.code[pixel - 1] == kBlend)) return;
    const BlendEntry* const here = a.map.entry + pixel * a.map.slots;
    const BlendEntry* const left = here - a.map.slots;
    for (uint32_t i = 0; i < count; ++i)
      if (here[i].channel != left[i].channel || here[i].weight != left[i].weight) return;
    a.map.entries[pixel] = static_cast<uint16_t>(count | kSame);
  }
};

// What the kernel of the convolution reads its tables by.
struct LabelTables {
  const float *bias, *constants, *sums, *masks;
  int32_t classes, channels, kernel, intervals;
  int64_t stride;
};

template <class T, bool kPooled>
struct LabelConvKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 6;
  static constexpr int kResident = kPooled ? 3 : 4;
  static constexpr int kQuad = 4;       // channels a thread
  static constexpr int kMaxQuads = 16;  // a block
  static constexpr int kRows = kTileHeight + kLabelConvMaxKernel - 1;
  static constexpr int kColumns = kTileWidth + kLabelConvMaxKernel - 1;
  static constexpr int kSharedFloats = 4096;  // of table rows
  static constexpr int kPixels = kTileHeight * kTileWidth;
  static constexpr uint16_t kMixed = 0xffff;

  struct Args {
    LabelSource source;
    PooledMap pooled;
    LabelTables tables;
    T* out;
    float* partials;
    float* counts;
    uint8_t* uniform;
    int64_t height, width;  // of the map that is convolved
    int64_t out_stride, row_begin, rows;
    uint32_t parts, tiles_across, channel_blocks;
    int32_t cout, quad_bits;
    bool reflect, vectors, in_shared;
  };

  struct Deviations {
    float mean[kThreads * kQuad], m2[kThreads * kQuad], count[kThreads];
  };
  struct Shared {
    union {
      alignas(16) float constants[kSharedFloats];
      Deviations deviations;
    };
    uint32_t word[kRows * kTileWidth];  // of a row of a window; see make_words
    uint16_t uniform[kPixels];          // the label of a window of one label, or kMixed
    uint16_t code[kRows * kColumns];
    uint8_t mark[kRows * kColumns];  // bit 0: an edge or entries, bit 1: entries as the pixel before
  };
  struct Local {
    float pivot[kQuad], sum[kQuad], squares[kQuad];
    int count;
  };

  // Blocks of channels of a tile follow each other, then tiles, then images.
  struct Place {
    int64_t n, part, y, x;  // y is counted from row_begin
    int first_channel;
  };
  static P2PFAST_HD Place place(const Args& a, int64_t block) {
    Place p;
    // Grids have fewer than 2^31 blocks, so 32 bits do.
    const uint32_t tile = static_cast<uint32_t>(block) / a.channel_blocks;
    p.first_channel = static_cast<int>(static_cast<uint32_t>(block) % a.channel_blocks << (a.quad_bits + 2));
    const uint32_t part = tile % a.parts, down = part / a.tiles_across;
    p.n = tile / a.parts;
    p.part = part;
    p.y = int64_t{down} * kTileHeight;
    p.x = int64_t{part % a.tiles_across} * kTileWidth;
    return p;
  }

  static P2PFAST_HD void load_tile(const Args& a, const Place& p, int thread, Shared& s) {
    const int kernel = a.tables.kernel, padding = kernel / 2;
    const int rows = kTileHeight + kernel - 1, columns = kTileWidth + kernel - 1;
    for (int i = thread; i < rows * columns; i += kThreads) {
      const int r = i / columns, c = i - r * columns;
      const int64_t y = padded_index(a.row_begin + p.y + r - padding, a.height, a.reflect);
      const int64_t x = padded_index(p.x + c - padding, a.width, a.reflect);
      uint32_t code = kOutside, mark = 0;
      if (y >= 0 && x >= 0) {
        if constexpr (kPooled) {
          const int64_t line = (p.n * a.height + y) * a.width;
          code = a.pooled.code[line + x];
          mark = (a.pooled.entries[line + x] & (kSame - 1)) != 0;
          // Of two neighbours the right one knows whether they are the same; reflected, it comes first.
          const int64_t before = padded_index(p.x + c - 1 - padding, a.width, a.reflect);
          if (before >= 0 && (a.pooled.entries[line + max2(x, before)] & kSame) != 0) mark |= 2;
        } else {
          code = a.source.code(p.n, y, x);
          mark = a.source.edge(p.n, y, x);
        }
      }
      s.code[r * kColumns + c] = static_cast<uint16_t>(code);
      s.mark[r * kColumns + c] = static_cast<uint8_t>(mark);
    }
    if (!a.in_shared) return;
    const int channels = kQuad << a.quad_bits;
    for (int i = thread; i < a.tables.classes * channels; i += kThreads) {
      const int label = i / channels, c = p.first_channel + i - label * channels;
      s.constants[i] = c < a.tables.stride ? a.tables.constants[label * a.tables.stride + c] : 0.0f;
    }
  }

  // Bits of row r of the window that begins at column x: 0-5 where the code differs from the next, 8-14
  // marks, 16-22 entries as the pixel before.
  static P2PFAST_HD void make_words(const Args& a, int thread, Shared& s) {
    const int kernel = a.tables.kernel, rows = kTileHeight + kernel - 1;
    for (int i = thread; i < rows * kTileWidth; i += kThreads) {
      const int r = i / kTileWidth, x = i % kTileWidth, at = r * kColumns + x;
      uint32_t word = 0, code = s.code[at];
      for (int k = 0; k < kernel; ++k) {
        const uint32_t mark = s.mark[at + k], next = k + 1 < kernel ? s.code[at + k + 1] : code;
        word |= (mark & 1u) << (8 + k) | (mark >> 1) << (16 + k) | static_cast<uint32_t>(next != code) << k;
        code = next;
      }
      s.word[i] = word;
    }
  }

  static P2PFAST_HD void find_uniform(const Args& a, int thread, Shared& s) {
    for (int i = thread; i < kPixels; i += kThreads) {
      const int r = i / kTileWidth, x = i % kTileWidth;
      const uint32_t code = s.code[r * kColumns + x];
      bool mixed = code > 255;
      for (int d = 0; d < a.tables.kernel; ++d)
        mixed |= (s.word[(r + d) * kTileWidth + x] & 0xffffu) != 0 || s.code[(r + d) * kColumns + x] != code;
      s.uniform[i] = mixed ? kMixed : static_cast<uint16_t>(code);
    }
  }

  static P2PFAST_HD void add(float (&sum)[kQuad], const float* row, float weight) {
    const Pack<float, kQuad> v = load_pack<kQuad>(row);
    P2PFAST_UNROLL
    for (int c = 0; c < kQuad; ++c) sum[c] += weight * v.value[c];
  }

  // A window that is not of one label.
  static P2PFAST_HD void sum_window(const Args& a, const Place& p, const Shared& s, int r, int x, int channel,
                                    float (&sum)[kQuad]) {
    const LabelTables& t = a.tables;
    const auto interval = [&](int first, int last) {
      return first * t.kernel - first * (first + 1) / 2 + last;
    };
    const Pack<float, kQuad> bias = load_pack<kQuad>(t.bias + channel);
    P2PFAST_UNROLL
    for (int c = 0; c < kQuad; ++c) sum[c] = bias.value[c];
    for (int d = 0; d < t.kernel; ++d) {
      const uint32_t word = s.word[(r + d) * kTileWidth + x];
      const uint16_t* const code = s.code + (r + d) * kColumns + x;
      const float* const sums = t.sums + int64_t{d} * t.channels * t.intervals * t.stride + channel;
      uint32_t ends = (word & 0xffu) | 1u << (t.kernel - 1);
      for (int first = 0; ends != 0; ends &= ends - 1) {
        const int last = lowest_bit(ends);
        const uint32_t label = code[last];
        if (label <= 255) {
          add(sum, sums + (static_cast<int32_t>(label) * t.intervals + interval(first, last)) * t.stride,
              1.0f);
        } else if (label == kInvalid) {
          sum[0] = sum[1] = sum[2] = sum[3] = float_of(0x7fc00000u);
        }
        first = last + 1;
      }
      uint32_t marks = (word >> 8) & 0xffu;
      if constexpr (!kPooled) {
        if (marks != 0)
          add(sum, t.masks + ((d << t.kernel) + static_cast<int32_t>(marks)) * t.stride + channel, 1.0f);
      } else if (marks != 0) {
        const uint32_t same = word >> 16;
        const int64_t y = padded_index(a.row_begin + p.y + r + d - t.kernel / 2, a.height, a.reflect);
        const int64_t line = (p.n * a.height + y) * a.width;
        while (marks != 0) {
          const int first = lowest_bit(marks);
          int last = first;
          while ((marks & same) >> (last + 1) & 1u) ++last;
          marks &= ~((2u << last) - 1u);
          const int64_t pixel = line + padded_index(p.x + x + first - t.kernel / 2, a.width, a.reflect);
          const int count = a.pooled.entries[pixel] & (kSame - 1);
          const BlendEntry* const entry = a.pooled.entry + pixel * a.pooled.slots;
          // A mixture's own sum first: one after another, all would round at the size of the whole.
          float part[kQuad] = {};
          for (int e = 0; e < count; ++e)
            add(part,
                sums +
                    (static_cast<int32_t>(entry[e].channel) * t.intervals + interval(first, last)) * t.stride,
                entry[e].weight);
          P2PFAST_UNROLL
          for (int c = 0; c < kQuad; ++c) sum[c] += part[c];
        }
      }
    }
  }

  static P2PFAST_HD void write_pixels(const Args& a, const Place& p, int thread, const Shared& s,
                                      Local& local) {
    const int quads = 1 << a.quad_bits, quad = thread & (quads - 1), lanes = kThreads >> a.quad_bits;
    const int channel = p.first_channel + quad * kQuad;
    local.count = 0;
    if (channel >= a.cout) return;
    const int64_t rows = min2<int64_t>(kTileHeight, a.rows - p.y);
    const int64_t columns = min2<int64_t>(kTileWidth, a.width - p.x);
    for (int i = thread >> a.quad_bits; i < kPixels; i += lanes) {
      const int r = i / kTileWidth, x = i % kTileWidth;
      if (r >= rows || x >= columns) continue;
      const uint32_t label = s.uniform[i];
      float v[kQuad];
      if (label == kMixed) {
        sum_window(a, p, s, r, x, channel, v);
      } else {
        Pack<float, kQuad> row;
        if (a.in_shared) {
          row = load_pack<kQuad>(s.constants + (label << (a.quad_bits + 2)) + quad * kQuad);
        } else {
          row = load_pack<kQuad>(a.tables.constants + label * a.tables.stride + channel);
        }
        P2PFAST_UNROLL
        for (int c = 0; c < kQuad; ++c) v[c] = row.value[c];
      }
      const int64_t pixel = (p.n * a.rows + p.y + r) * a.width + p.x + x;
      T* const out = a.out + pixel * a.out_stride + channel;
      if (a.vectors) {
        Pack<T, kQuad> stored;
        P2PFAST_UNROLL
        for (int c = 0; c < kQuad; ++c) narrow(v[c], &stored.value[c]);
        store_pack(out, stored);
      } else {
        P2PFAST_UNROLL
        for (int c = 0; c < kQuad; ++c)
          if (channel + c < a.cout) narrow(v[c], out + c);
      }
      if (a.uniform != nullptr && channel == 0)
        a.uniform[pixel] = static_cast<uint8_t>(label == kMixed ? 255 : label);
      if (a.partials == nullptr) continue;
      P2PFAST_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        // Around the thread's first value: of so few, their deviations from it are never much larger than
        // their deviations from the mean.
        if (local.count == 0) {
          local.pivot[c] = v[c];
          local.sum[c] = local.squares[c] = 0;
        } else {
          const float d = v[c] - local.pivot[c];
          local.sum[c] += d;
          local.squares[c] += d * d;
        }
      }
      ++local.count;
    }
  }

  // Means are shared as differences from a value near them all, which keeps their small digits: the row of
  // the tile's first label.
  static P2PFAST_HD const float* reference(const Args& a, const Shared& s, int channel) {
    const int first = a.tables.kernel / 2 * (kColumns + 1);
    const int64_t label = s.code[first];
    return (label <= 255 ? a.tables.constants + label * a.tables.stride : a.tables.bias) + channel;
  }

  static P2PFAST_HD void share_deviations(const Args& a, const Place& p, int thread, Shared& s,
                                          const Local& local) {
    s.deviations.count[thread] = static_cast<float>(local.count);
    if (local.count == 0) return;
    const int quad = thread & ((1 << a.quad_bits) - 1);
    const float* const near = reference(a, s, p.first_channel + quad * kQuad);
    const float n = static_cast<float>(local.count);
    P2PFAST_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      const float shift = local.sum[c] / n;
      s.deviations.mean[thread * kQuad + c] = (local.pivot[c] - near[c]) + shift;
      const float m2 = local.squares[c] - shift * local.sum[c];
      s.deviations.m2[thread * kQuad + c] = m2 < 0.0f ? 0.0f : m2;
    }
  }

  // A channel a thread: Chan's formula for all lanes at once, in their order. Lane 0 has pixels.
  static P2PFAST_HD void merge_deviations(const Args& a, const Place& p, int thread, const Shared& s) {
    const int quads = 1 << a.quad_bits, channel = p.first_channel + thread;
    if (thread == 0 && p.n == 0 && p.first_channel == 0 && a.counts != nullptr) {
      a.counts[p.part] = static_cast<float>(min2<int64_t>(kTileHeight, a.rows - p.y) *
                                            min2<int64_t>(kTileWidth, a.width - p.x));
    }
    if (a.partials == nullptr || thread >= kQuad * quads || channel >= a.cout) return;
    const Deviations& d = s.deviations;
    float total = 0, shift = 0, m2 = 0;
    for (int i = thread / kQuad; i < kThreads; i += quads) {
      if (d.count[i] == 0.0f) continue;
      total += d.count[i];
      shift += d.count[i] * (d.mean[i * kQuad + thread % kQuad] - d.mean[thread]);
    }
    shift /= total;
    for (int i = thread / kQuad; i < kThreads; i += quads) {
      if (d.count[i] == 0.0f) continue;
      const float deviation = d.mean[i * kQuad + thread % kQuad] - d.mean[thread] - shift;
      m2 += d.m2[i * kQuad + thread % kQuad] + d.count[i] * deviation * deviation;
    }
    float* const partial = a.partials + (p.n * a.parts + p.part) * 2 * a.cout + channel;
    partial[0] = *reference(a, s, channel) + (d.mean[thread] + shift);
    partial[a.cout] = m2;
  }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared& s, Local& local) {
    const Place p = place(a, block);
    if constexpr (kPhase == 0) load_tile(a, p, thread, s);
    if constexpr (kPhase == 1) make_words(a, thread, s);
    if constexpr (kPhase == 2) find_uniform(a, thread, s);
    if constexpr (kPhase == 3) write_pixels(a, p, thread, s, local);
    if constexpr (kPhase == 4)
      if (a.partials != nullptr) share_deviations(a, p, thread, s, local);
    if constexpr (kPhase == 5) merge_deviations(a, p, thread, s);
  }
};

// Builds the tables of csrc/cpu/label_conv.h; a float a thread. Sums are taken in double and rounded once.
struct LabelPackKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 4;

  struct Args {
    LabelConvLayout layout;
    int32_t classes, cout, kernel;
    bool has_edges;
    const float *weight, *bias;
    float* packed;
  };
  struct Shared {};
  struct Local {};

  static int64_t blocks(const Args& a) { return ceil_div(a.layout.packed_floats, kThreads); }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    const LabelConvLayout& l = a.layout;
    const int64_t i = block * kThreads + thread, taps = int64_t{a.kernel} * a.kernel;
    if (i >= l.packed_floats) return;
    const int64_t start = i < l.constants ? l.bias
                          : i < l.sums    ? l.constants
                          : i < l.masks   ? l.sums
                                          : l.masks;
    int64_t row = (i - start) / l.stride;
    const int64_t o = i - start - row * l.stride;
    double sum = 0;
    if (o >= a.cout) {
      sum = 0;  // padding
    } else if (start == l.bias) {
      if (row == 0 && a.bias != nullptr) sum = a.bias[o];
    } else if (start == l.constants) {
      if (row < a.classes) {
        if (a.bias != nullptr) sum = a.bias[o];
        const float* const w = a.weight + (o * l.channels + row) * taps;
        for (int64_t tap = 0; tap < taps; ++tap) sum += w[tap];
      }
    } else if (start == l.sums) {
      int64_t last = row % l.intervals;
      row /= l.intervals;
      const int64_t d = row / l.channels, channel = row - d * l.channels;
      if (d < a.kernel) {
        int64_t first = 0;
        while (last >= a.kernel - first) last -= a.kernel - first++;
        const float* const w = a.weight + (o * l.channels + channel) * taps + d * a.kernel;
        for (int64_t tap = first; tap <= first + last; ++tap) sum += w[tap];
      }
    } else if (a.has_edges && row < int64_t{a.kernel} << a.kernel) {
      const int64_t d = row >> a.kernel;
      const float* const w = a.weight + (o * l.channels + a.classes) * taps + d * a.kernel;
      for (int tap = 0; tap < a.kernel; ++tap)
        if ((row >> tap & 1) != 0) sum += w[tap];
    }
    a.packed[i] = static_cast<float>(sum);
  }
};

// Where the pooled maps are in scratch memory, finest first; returns its size.
inline int64_t label_conv_scratch(const LabelConvShape& shape, uint8_t* scratch, PooledMap* maps) {
  const int64_t channels = shape.classes + (shape.has_edges ? 1 : 0);
  int64_t height = shape.height, width = shape.width, bytes = 0;
  const auto take = [&](int64_t size) {
    uint8_t* const at = scratch != nullptr ? scratch + bytes : nullptr;
    bytes += ceil_div(size, 64) * 64;
    return at;
  };
  for (int i = 0; i < shape.pool_levels; ++i) {
    height = (height + 1) / 2;
    width = (width + 1) / 2;
    // A pixel sees a square of this many pixels of the full map; its mixture has an entry for each label,
    // which are no more than these, and one for edges.
    const int64_t reach = (int64_t{4} << i) - 1, pixels = shape.batch * height * width;
    PooledMap map{height, width, min2(channels, reach * reach + 1), nullptr, nullptr, nullptr};
    map.code = reinterpret_cast<uint16_t*>(take(pixels * 2));
    map.entries = reinterpret_cast<uint16_t*>(take(pixels * 2));
    map.entry =
        reinterpret_cast<BlendEntry*>(take(pixels * map.slots * static_cast<int64_t>(sizeof(BlendEntry))));
    if (maps != nullptr) maps[i] = map;
  }
  return bytes;
}

inline int64_t label_conv_tiles(int64_t rows, int64_t width) {
  return ceil_div(rows, kTileHeight) * ceil_div(width, kTileWidth);
}

// Calls launch.operator()<Kernel>(args, blocks) for each kernel in turn.
template <class Launch>
void run_label_conv(const LabelConvCall& call, Launch&& launch) {
  const LabelConvShape& shape = call.shape;
  const LabelConvLayout layout = label_conv_layout(shape);
  const LabelSource source{call.labels,   call.edges,    call.ids,     call.label_bytes,
                           call.id_bytes, shape.classes, shape.height, shape.width};
  PooledMap maps[kLabelConvMaxPoolLevels] = {};
  label_conv_scratch(shape, static_cast<uint8_t*>(call.scratch), maps);
  for (int i = 0; i < shape.pool_levels; ++i) {
    if (i == 0) {
      const LabelPoolKernel<false>::Args args{source, {}, maps[0], shape.batch};
      launch.template operator()<LabelPoolKernel<false>>(args, LabelPoolKernel<false>::blocks(args));
    } else {
      const LabelPoolKernel<true>::Args args{source, maps[i - 1], maps[i], shape.batch};
      launch.template operator()<LabelPoolKernel<true>>(args, LabelPoolKernel<true>::blocks(args));
    }
  }
  const PooledMap pooled = shape.pool_levels > 0 ? maps[shape.pool_levels - 1] : PooledMap{};
  if (shape.pool_levels > 0) {
    const LabelSameKernel::Args args{pooled, shape.batch};
    launch.template operator()<LabelSameKernel>(args, LabelSameKernel::blocks(args));
  }
  const auto convolve = [&]<class T, bool kPooled>() {
    using Kernel = LabelConvKernel<T, kPooled>;
    typename Kernel::Args a{};
    a.source = source;
    a.pooled = pooled;
    a.tables = {call.packed + layout.bias,
                call.packed + layout.constants,
                call.packed + layout.sums,
                call.packed + layout.masks,
                shape.classes,
                static_cast<int32_t>(layout.channels),
                shape.kernel,
                static_cast<int32_t>(layout.intervals),
                layout.stride};
    a.out = static_cast<T*>(call.out);
    a.partials = call.partials;
    a.counts = call.counts;
    a.uniform = call.uniform;
    a.height = layout.out_height;
    a.width = layout.out_width;
    a.out_stride = call.out_stride;
    a.row_begin = call.row_begin;
    a.rows = (call.row_end > 0 ? call.row_end : layout.out_height) - call.row_begin;
    const int64_t parts = label_conv_tiles(a.rows, a.width);
    a.parts = static_cast<uint32_t>(parts);
    a.tiles_across = static_cast<uint32_t>(ceil_div(a.width, kTileWidth));
    a.cout = shape.cout;
    while (1 << a.quad_bits < Kernel::kMaxQuads && Kernel::kQuad << a.quad_bits < shape.cout) ++a.quad_bits;
    a.channel_blocks = static_cast<uint32_t>(ceil_div(shape.cout, Kernel::kQuad << a.quad_bits));
    a.reflect = shape.reflect;
    a.vectors = shape.cout % Kernel::kQuad == 0 && call.out_stride % Kernel::kQuad == 0 &&
                reinterpret_cast<uintptr_t>(call.out) % (Kernel::kQuad * sizeof(T)) == 0;
    a.in_shared = shape.classes * (Kernel::kQuad << a.quad_bits) <= Kernel::kSharedFloats;
    launch.template operator()<Kernel>(a, shape.batch * parts * a.channel_blocks);
  };
  const auto typed = [&]<class T>(T) {
    return shape.pool_levels > 0 ? convolve.template operator()<T, true>()
                                 : convolve.template operator()<T, false>();
  };
  switch (call.type) {
    case StoredType::kFloat32:
      return typed(float{});
    case StoredType::kBFloat16:
      return typed(BFloat16{});
    case StoredType::kFloat16:
      return typed(Float16{});
  }
}

}  // namespace p2pfast::cuda
