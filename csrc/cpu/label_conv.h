// The first convolution of a label-to-image generator, computed from the integer label map and the
// instance-edge map without the one-hot tensor, at full or at pooled resolution.
// Mathematics: p2pfast/ops/label_conv/README.md.
//
// How to call it:
//   LabelConvShape shape = {...};
//   label_conv_check(shape);                                    // throws std::invalid_argument
//   LabelConvLayout layout = label_conv_layout(shape);          // sizes of everything below
//   label_conv().pack(shape, weight, bias, packed);             // once per weight
//   if (label_conv().max_label(labels, n * h * w) >= classes) ... // reject the input
//   label_conv().run(args);
// Nothing is allocated: packed tables, scratch and outputs belong to the caller. Scratch must be
// aligned to 8 bytes; outputs are written faster when aligned to 64. Nothing needs to be initialised.
// pack, max_label and run use the calling thread's pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/level.h"

namespace p2pfast {

inline constexpr int kLabelConvMaxKernel = 7;
inline constexpr int kLabelConvMaxClasses = 256;
inline constexpr int kLabelConvMaxPoolLevels = 8;

// Everything that sizes depend on. Plain data.
struct LabelConvShape {
  int64_t batch = 1;
  int64_t height = 1;  // of the label map, before pooling
  int64_t width = 1;
  int32_t classes = 1;     // labels are in [0, classes); at most kLabelConvMaxClasses
  bool has_edges = false;  // the convolution has classes + 1 input channels, the edges last
  int32_t cout = 1;
  int32_t kernel = 7;       // odd, at most kLabelConvMaxKernel; stride 1, padding (kernel - 1) / 2
  int32_t pool_levels = 0;  // times AvgPool2d(3, stride=2, padding=1, count_include_pad=False) comes first
  bool reflect = true;      // reflection padding, else zero padding
  int64_t band_rows = 0;    // output rows a band of statistics; 0: no statistics
};

// Derived sizes. Offsets are in floats from the start of the packed tables.
struct LabelConvLayout {
  int64_t channels;  // of the convolution's input: classes, + 1 with edges
  int64_t stride;    // floats (or bfloat16s) an output pixel: cout rounded up to 16
  int64_t out_height;
  int64_t out_width;
  int64_t bands;  // of statistics an image; 0 without

  int64_t intervals;  // kernel * (kernel + 1) / 2 intervals [a, b] of taps in a row of the window
  int64_t bias;       // [stride]
  int64_t constants;  // [classes][stride]: bias + all taps, the output of a window of one label
  int64_t sums;       // [kernel][channels][intervals][stride]: sums over taps a..b of a row
  int64_t masks;      // [kernel][1 << kernel][stride]: sums over the taps that are edges; with edges only
  int64_t packed_floats;

  int64_t output_elements;  // batch * out_height * out_width * stride
  int64_t partial_floats;   // batch * bands * 2 * stride
  int64_t uniform_bytes;    // batch * out_height * out_width
  int64_t scratch_bytes;    // whatever the number of threads; most of it is touched only for mixed pixels
};

struct LabelConvArgs {
  LabelConvShape shape;
  const uint8_t* labels;  // (N, H, W) dense, every value < classes (not checked here: see max_label)
  const uint8_t* edges;   // (N, H, W) dense, nonzero = edge; null exactly when !shape.has_edges
  const float* packed;    // written by pack
  void* out;              // (N, H', W', stride) float32, or bfloat16 if out_bf16; padding lanes become 0
  bool out_bf16;
  float* partials;   // null, or (N, bands, 2, stride): mean and sum of squared deviations of each band
                     // of the float32 values; a band holds rows_in_band * W' of them
  uint8_t* uniform;  // null, or (N, H', W'): the label of a window that holds one label, no edge and no
                     // padded tap, 255 for any other window (needs classes <= 255)
  void* scratch;     // layout.scratch_bytes
  // Only output rows [row_begin, row_end) of each image; row_end 0: up to the last. out, partials and
  // uniform then start at row_begin and hold so many rows, in as many bands of statistics.
  int64_t row_begin = 0, row_end = 0;
};

struct LabelConvKernels {
  // weight (cout, channels, kernel, kernel) dense float32, bias (cout) or null; writes
  // layout.packed_floats floats. Only classes, has_edges, cout and kernel of the shape matter.
  void (*pack)(const LabelConvShape& shape, const float* weight, const float* bias, float* packed);
  // The largest of count labels; 0 for none.
  int (*max_label)(const uint8_t* labels, int64_t count);
  // Same results at any number of threads.
  void (*run)(const LabelConvArgs& args);
};

// Throws std::invalid_argument naming the field that no kernel supports.
void label_conv_check(const LabelConvShape& shape);
LabelConvLayout label_conv_layout(const LabelConvShape& shape);

// Scratch memory, also used by the kernels themselves. All offsets are in bytes and multiples of 64.
struct LabelConvScratch {
  // One for each pooled resolution, finest first.
  struct Pool {
    int64_t height, width;
    int64_t label;    // [height][width]: its label if it has one
    int64_t mark;     // uint8 [height][width]: 0 pure, 1 with an edge, 2 of several labels
    int64_t first;    // int32 [height][width]: where a mixture's entries start in its row
    int64_t entries;  // LabelConvEntry [height][row_entries]
    int64_t row_entries;
  } pools[kLabelConvMaxPoolLevels];

  int64_t row_bytes;  // of a padded row of labels, a multiple of 64
  int64_t row_words;  // row_bytes / 64: 64-bit words a row of bits
  int64_t rows;       // uint8 [H'][row_bytes]: labels padded to the left and right
  int64_t changes;    // uint64 [H'][row_words]: bit j: label j differs from label j + 1
  int64_t marks;      // uint64 [H'][row_words]: bit j: pixel j has an edge or, if pooled, entries
  int64_t blends;     // uint64 [H'][row_words]: bit j: pooled pixel j is of several labels
  int64_t plain;      // uint64 [H'][row_words]: bit x: window row x .. x + kernel - 1 has one label, no mark
  int64_t down;  // uint64 [H'][row_words]: bit x: the label under the window's centre differs a row below

  int64_t prepare_rows;  // rows a task of preparation
  int64_t band_rows;     // rows a task of the convolution
  int64_t task;          // per task
  int64_t task_bytes;
  int64_t bytes;
};

// One channel of a mixture; a mixture is a run of these, ended by one with last set.
struct LabelConvEntry {
  float weight;
  uint32_t offset : 31;  // of the channel in a row of LabelConvLayout::sums, in floats
  uint32_t last : 1;
};

LabelConvScratch label_conv_scratch(const LabelConvShape& shape);

P2PFAST_PER_LEVEL(LabelConvKernels, label_conv)

}  // namespace p2pfast
