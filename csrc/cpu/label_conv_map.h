// Steps 1 and 2 of the convolution from labels: pooling to pure pixels and mixtures, and rows of bytes and
// bits that tell where windows of one label are. Included by kernels/label_conv.cpp only.
#pragma once

#include "cpu/label_conv.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

constexpr int64_t kPoolRows = 8;    // a task
constexpr int64_t kPoolTile = 256;  // pooled pixels

using Entry = LabelConvEntry;

// Bit j: a[j] != b[j].
P2PFAST_INLINE uint64_t differ64(const uint8_t* a, const uint8_t* b) {
#ifdef __AVX2__
  uint64_t bits = 0;
  for (int i = 0; i < 2; ++i) {
    __m256i u, v;
    std::memcpy(&u, a + 32 * i, 32);
    std::memcpy(&v, b + 32 * i, 32);
    const uint32_t equal = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(u, v)));
    bits |= static_cast<uint64_t>(~equal) << (32 * i);
  }
  return bits;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t u, v;
    std::memcpy(&u, a + 8 * i, 8);
    std::memcpy(&v, b + 8 * i, 8);
    // The top bit of every byte that is not zero, then the eight of them side by side.
    const uint64_t low = 0x7f7f7f7f7f7f7f7f;
    const uint64_t d = u ^ v;
    const uint64_t tops = (((d & low) + low) | d) & ~low;
    bits |= (((tops >> 7) * 0x0102040810204080u) >> 56) << (8 * i);
  }
  return bits;
#endif
}

// The 32 bits from bit x on; words are little-endian on every processor this is built for.
P2PFAST_INLINE uint32_t bits_at(const uint64_t* words, int64_t x) {
  uint64_t v;
  std::memcpy(&v, reinterpret_cast<const uint8_t*>(words) + (x >> 3), 8);
  return static_cast<uint32_t>(v >> (x & 7));
}

P2PFAST_INLINE int64_t reflected(int64_t i, int64_t size) {
  if (i < 0) return -i;
  return i < size ? i : 2 * size - 2 - i;
}

// What is special about a pooled pixel.
enum Mark : uint8_t {
  kPure = 0,   // one label, no edge
  kEdged = 1,  // one label; its entries (the edge channel's) come on top of it
  kBlend = 2,  // several labels: its entries replace the label
};

// A map of pixels: the input (marks are edges) or a pooled one (marks are of type Mark).
struct Pixels {
  int64_t height, width;
  const uint8_t* label;
  const uint8_t* mark;   // null: none is marked
  const int32_t* first;  // null for the input
  const Entry* entries;
  int64_t row_entries;
};

P2PFAST_INLINE void add_entry(Entry* list, int* count, uint32_t offset, float weight) {
  for (int i = 0; i < *count; ++i) {
    if (list[i].offset == offset) {
      list[i].weight += weight;
      return;
    }
  }
  list[(*count)++] = {weight, offset & 0x7fffffffu, 0};
}

struct Mixture {
  Mark mark;
  int entries;
};

// Where the table rows of a channel are: channel * floats; the edges are channel `edges`.
struct Channels {
  uint32_t floats, edges;
  uint32_t offset(uint32_t channel) const { return channel * floats; }
};

// The mean of the (up to nine) pixels under pooled pixel (py, px), which are not all of one label
// without an edge.
Mixture mix(const Pixels& in, int64_t py, int64_t px, Channels channels, Entry* list) {
  const int64_t y0 = max2<int64_t>(2 * py - 1, 0), y1 = min2(2 * py + 1, in.height - 1);
  const int64_t x0 = max2<int64_t>(2 * px - 1, 0), x1 = min2(2 * px + 1, in.width - 1);
  const uint32_t edge_offset = channels.offset(channels.edges);
  int count = 0;
  float edge = 0;
  for (int64_t y = y0; y <= y1; ++y) {
    for (int64_t x = x0; x <= x1; ++x) {
      const int64_t i = y * in.width + x;
      const int mark = in.mark != nullptr ? in.mark[i] : 0;
      if (in.first == nullptr || mark != kBlend) add_entry(list, &count, channels.offset(in.label[i]), 1.0f);
      if (mark == 0) continue;
      if (in.first == nullptr) {
        edge += 1.0f;
        continue;
      }
      const Entry* e = in.entries + y * in.row_entries + in.first[i];
      do {
        if (e->offset == edge_offset) {
          edge += e->weight;
        } else {
          add_entry(list, &count, e->offset, e->weight);
        }
      } while ((e++)->last == 0);
    }
  }
  const Mark mark = count == 1 ? kEdged : kBlend;
  if (mark == kEdged) count = 0;
  if (edge != 0) list[count++] = {edge, edge_offset & 0x7fffffffu, 0};
  const float pixels = static_cast<float>((y1 - y0 + 1) * (x1 - x0 + 1));
  for (int i = 0; i < count; ++i) list[i].weight /= pixels;
  list[count - 1].last = 1;
  return {mark, count};
}

P2PFAST_INLINE bool same_entries(const Entry* a, const Entry* b, int count) {
  return __builtin_memcmp(a, b, static_cast<size_t>(count) * sizeof(Entry)) == 0;
}

struct Pooled {
  int64_t height, width;
  uint8_t* label;
  uint8_t* mark;
  int32_t* first;
  Entry* entries;
  int64_t row_entries;
};

void pool_row(const Pixels& in, const Pooled& out, int64_t py, Channels channels) {
  const int64_t y1 = 2 * py, y0 = max2<int64_t>(y1 - 1, 0), y2 = min2(y1 + 1, in.height - 1);
  const uint8_t* const l0 = in.label + y0 * in.width;
  const uint8_t* const l1 = in.label + y1 * in.width;
  const uint8_t* const l2 = in.label + y2 * in.width;
  uint8_t* const label = out.label + py * out.width;
  uint8_t* const mark = out.mark + py * out.width;
  int32_t* const first = out.first + py * out.width;
  Entry* const entries = out.entries + py * out.row_entries;
  int32_t used = 0;      // entries of this row
  int32_t previous = 0;  // the entries of the latest mixture, and how many they are
  int previous_count = 0;
  // column[i], pair[i]: input column begin + i is not of one unmarked label, or it or the next are
  // not, or differ from each other.
  uint8_t column[2 * kPoolTile + 2], pair[2 * kPoolTile + 2];
  for (int64_t p0 = 0; p0 < out.width; p0 += kPoolTile) {
    const int64_t p1 = min2(p0 + kPoolTile, out.width);
    const int64_t begin = 2 * p0 - 1;  // -1 in the first tile
    const int64_t from = max2<int64_t>(begin, 0);
    const int64_t to = min2(2 * p1, in.width);  // one past the last column the tile sees
    uint8_t* const c = column - begin;
    uint8_t* const q = pair - begin;
    for (int64_t x = from; x < to; ++x) c[x] = static_cast<uint8_t>((l0[x] ^ l1[x]) | (l1[x] ^ l2[x]));
    if (in.mark != nullptr) {
      const uint8_t* const m0 = in.mark + y0 * in.width;
      const uint8_t* const m1 = in.mark + y1 * in.width;
      const uint8_t* const m2 = in.mark + y2 * in.width;
      for (int64_t x = from; x < to; ++x) c[x] = static_cast<uint8_t>(c[x] | m0[x] | m1[x] | m2[x]);
    }
    if (begin < 0) q[-1] = 0;
    for (int64_t x = from; x + 1 < to; ++x)
      q[x] = static_cast<uint8_t>(c[x] | c[x + 1] | (l1[x] ^ l1[x + 1]));
    q[to - 1] = c[to - 1];
    for (int64_t px = p0; px < p1; ++px) {
      mark[px] = static_cast<uint8_t>((q[2 * px - 1] | q[2 * px]) != 0);
      label[px] = l1[2 * px];
    }
    for (int64_t px = p0; px < p1; ++px) {
      if (mark[px] == 0) continue;
      const Mixture m = mix(in, py, px, channels, entries + used);
      mark[px] = m.mark;
      // Neighbours that are the same mixture share its entries, which is how the convolution knows.
      if (px > 0 && mark[px - 1] == m.mark && previous_count == m.entries &&
          same_entries(entries + previous, entries + used, m.entries)) {
        first[px] = previous;
        continue;
      }
      first[px] = previous = used;
      previous_count = m.entries;
      used += m.entries;
    }
  }
}

Pixels pool(const Pixels& in, const LabelConvScratch::Pool& at, uint8_t* scratch, Channels channels) {
  const Pooled out{at.height,
                   at.width,
                   scratch + at.label,
                   scratch + at.mark,
                   reinterpret_cast<int32_t*>(scratch + at.first),
                   reinterpret_cast<Entry*>(scratch + at.entries),
                   at.row_entries};
  parallel_for(ceil_div(at.height, kPoolRows), [&](int64_t task, int) {
    const int64_t end = min2((task + 1) * kPoolRows, at.height);
    for (int64_t y = task * kPoolRows; y < end; ++y) pool_row(in, out, y, channels);
  });
  return {out.height, out.width, out.label, out.mark, out.first, out.entries, out.row_entries};
}

// The map as rows of bytes and bits, padded by `padding` on both sides (padded column j is column
// j - padding of the map).
struct Prepared {
  int64_t height, width, kernel, padding;
  bool reflect;
  int64_t row_bytes, row_words;
  uint8_t* rows;
  uint64_t *changes, *marks, *blends, *plain, *down;
};

// Zero padding copies the border: what it holds is never added up.
void pad_row(const Prepared& m, const uint8_t* from, uint8_t* to) {
  std::memcpy(to + m.padding, from, static_cast<size_t>(m.width));
  for (int64_t i = 1; i <= m.padding; ++i) {
    to[m.padding - i] = from[m.reflect ? i : 0];
    to[m.padding + m.width - 1 + i] = from[m.width - 1 - (m.reflect ? i : 0)];
  }
  const int64_t end = m.width + 2 * m.padding;
  std::memset(to + end, to[end - 1], static_cast<size_t>(m.row_bytes - end));
}

void prepare_row(const Prepared& m, const Pixels& in, int64_t y, uint8_t* mark_row) {
  const uint8_t* const source = in.label + y * in.width;
  uint8_t* const row = m.rows + y * m.row_bytes;
  uint64_t* const changes = m.changes + y * m.row_words;
  uint64_t* const marks = m.marks + y * m.row_words;
  uint64_t* const blends = m.blends + y * m.row_words;
  uint64_t* const plain = m.plain + y * m.row_words;
  uint64_t* const down = m.down + y * m.row_words;
  const int64_t words = m.row_words - 1;

  pad_row(m, source, row);
  for (int64_t j = 0; j < words; ++j) changes[j] = differ64(row + 64 * j, row + 64 * j + 1);
  changes[words] = 0;

  std::memset(marks, 0, static_cast<size_t>(m.row_words) * 8);
  std::memset(blends, 0, static_cast<size_t>(m.row_words) * 8);
  if (in.mark != nullptr) {
    const uint8_t zeros[64] = {};
    uint8_t blend[64];
    std::memset(blend, kBlend, sizeof(blend));
    pad_row(m, in.mark + y * in.width, mark_row);
    for (int64_t j = 0; j < words; ++j) {
      marks[j] = differ64(mark_row + 64 * j, zeros);
      blends[j] = ~differ64(mark_row + 64 * j, blend);
    }
  }

  const int64_t first = m.reflect ? 0 : m.padding;
  const int64_t last = m.reflect ? m.width - 1 : m.width - 1 - m.padding;
  for (int64_t j = 0; j < m.row_words; ++j) {
    plain[j] = 0;
    if (64 * j > last || j >= words) continue;
    uint64_t broken = marks[j];
    for (int s = 1; s < m.kernel; ++s) {
      broken |= (changes[j] >> (s - 1)) | (marks[j] >> s) | (marks[j + 1] << (64 - s));
      if (s > 1) broken |= changes[j + 1] << (65 - s);
    }
    uint64_t valid = ~uint64_t{0};
    if (last - 64 * j < 63) valid >>= 63 - (last - 64 * j);
    if (first > 64 * j) valid &= ~uint64_t{0} << (first - 64 * j);
    plain[j] = ~broken & valid;
  }

  std::memset(down, 0, static_cast<size_t>(m.row_words) * 8);
  if (y + 1 == m.height) return;
  for (int64_t x = 0; x < m.width; x += 64) {
    if (x + 64 <= m.width) {
      down[x / 64] = differ64(source + x, source + x + m.width);
    } else {  // the map may end with this row
      uint8_t a[64] = {}, b[64] = {};
      std::memcpy(a, source + x, static_cast<size_t>(m.width - x));
      std::memcpy(b, source + x + m.width, static_cast<size_t>(m.width - x));
      down[x / 64] = differ64(a, b);
    }
  }
}

}  // namespace
}  // namespace p2pfast::P2PFAST_LEVEL
