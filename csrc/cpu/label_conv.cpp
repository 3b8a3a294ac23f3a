#include "cpu/label_conv.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace p2pfast {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 20;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Hands out consecutive offsets, each a multiple of 64.
struct Offsets {
  int64_t end = 0;
  int64_t take(int64_t size) {
    const int64_t begin = end;
    end = round_up(end + size, 64);
    return begin;
  }
};

[[noreturn]] void fail(const std::string& field, int64_t value, const std::string& remedy) {
  throw std::invalid_argument("label_conv: " + field + " is " + std::to_string(value) + "; " + remedy);
}

void check_range(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(field, value, "it must be from " + std::to_string(low) + " to " + std::to_string(high));
}

int64_t pooled(int64_t side, int levels) {
  for (int i = 0; i < levels; ++i) side = (side + 1) / 2;
  return side;
}

}  // namespace

void label_conv_check(const LabelConvShape& s) {
  check_range("batch", s.batch, 0, int64_t{1} << 31);
  check_range("height", s.height, 1, kMaxSide);
  check_range("width", s.width, 1, kMaxSide);
  check_range("classes", s.classes, 1, kLabelConvMaxClasses);
  check_range("cout", s.cout, 1, 1 << 16);
  check_range("kernel", s.kernel, 1, kLabelConvMaxKernel);
  check_range("pool_levels", s.pool_levels, 0, kLabelConvMaxPoolLevels);
  check_range("band_rows", s.band_rows, 0, kMaxSide);
  if (s.kernel % 2 == 0) fail("kernel", s.kernel, "it must be odd");
  const int64_t padding = (s.kernel - 1) / 2;
  const int64_t side = std::min(pooled(s.height, s.pool_levels), pooled(s.width, s.pool_levels));
  if (s.reflect && side <= padding)
    fail("the pooled map's smaller side", side,
         "reflection padding of " + std::to_string(padding) + " needs a larger one (or use zero padding)");
}

LabelConvLayout label_conv_layout(const LabelConvShape& s) {
  LabelConvLayout l{};
  l.channels = s.classes + (s.has_edges ? 1 : 0);
  l.stride = round_up(s.cout, 16);
  l.out_height = pooled(s.height, s.pool_levels);
  l.out_width = pooled(s.width, s.pool_levels);
  l.bands = s.band_rows > 0 ? (l.out_height + s.band_rows - 1) / s.band_rows : 0;

  l.intervals = s.kernel * (s.kernel + 1) / 2;
  Offsets floats;
  l.bias = floats.take(l.stride);
  l.constants = floats.take(s.classes * l.stride);
  l.sums = floats.take(s.kernel * l.channels * l.intervals * l.stride);
  l.masks = floats.take(s.has_edges ? (int64_t{s.kernel} << s.kernel) * l.stride : 0);
  l.packed_floats = floats.end;

  const int64_t pixels = s.batch * l.out_height * l.out_width;
  l.output_elements = pixels * l.stride;
  l.partial_floats = s.batch * l.bands * 2 * l.stride;
  l.uniform_bytes = pixels;
  l.scratch_bytes = label_conv_scratch(s).bytes;
  return l;
}

LabelConvScratch label_conv_scratch(const LabelConvShape& s) {
  LabelConvScratch k{};
  const int64_t channels = s.classes + (s.has_edges ? 1 : 0);
  const int64_t stride = round_up(s.cout, 16);
  Offsets bytes;
  int64_t height = s.height, width = s.width;
  for (int i = 0; i < s.pool_levels; ++i) {
    height = (height + 1) / 2;
    width = (width + 1) / 2;
    // A pixel of level i + 1 sees a square of this many pixels of the full map.
    const int64_t reach = (int64_t{4} << i) - 1;
    LabelConvScratch::Pool& pool = k.pools[i];
    pool.height = height;
    pool.width = width;
    pool.label = bytes.take(height * width);
    pool.mark = bytes.take(height * width);
    pool.first = bytes.take(height * width * static_cast<int64_t>(sizeof(int32_t)));
    pool.row_entries = width * std::min(channels, reach * reach + 1);
    pool.entries = bytes.take(height * pool.row_entries * static_cast<int64_t>(sizeof(LabelConvEntry)));
  }
  // The last word of a row stays spare, so that bits can be read across the end.
  k.row_bytes = round_up(width + s.kernel, 64) + 64;
  k.row_words = k.row_bytes / 64;
  const int64_t bits = height * k.row_words * static_cast<int64_t>(sizeof(uint64_t));
  k.rows = bytes.take(height * k.row_bytes);
  k.changes = bytes.take(bits);
  k.marks = bytes.take(bits);
  k.blends = bytes.take(bits);
  k.plain = bytes.take(bits);
  k.down = bytes.take(bits);

  k.prepare_rows = 16;
  k.band_rows = s.band_rows > 0 ? s.band_rows : 8;
  const int64_t tasks =
      (height + std::min(k.prepare_rows, k.band_rows) - 1) / std::min(k.prepare_rows, k.band_rows);
  // Preparation holds a row of marks; the convolution four rows of floats, two of doubles and a
  // count for each label.
  const int64_t statistics = stride * (4 * 4 + 2 * 8) + kLabelConvMaxClasses * 8;
  k.task_bytes = round_up(std::max(k.row_bytes, statistics), 64);
  k.task = bytes.take(tasks * k.task_bytes);
  k.bytes = bytes.end;
  return k;
}

}  // namespace p2pfast
