// The first convolution from labels: see cpu/label_conv.h and p2pfast/ops/label_conv/README.md.
//
// 1. Pooling (if any) turns the label map into pure pixels (one label, no edge) and mixtures.
// 2. Preparation pads each row and turns it into bits: where the label changes, where a mark (an
//    edge, or a mixture) is, where a row of the window is plain.
// 3. The convolution looks windows of one label up in a table and adds table rows for the others.
#include "cpu/label_conv.h"

#include "cpu/label_conv_map.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace p2pfast::P2PFAST_LEVEL {
namespace {

constexpr int kMaxKernel = kLabelConvMaxKernel;
constexpr int kMaxSums = kMaxKernel * (kMaxKernel + 1);  // at most kernel label runs and an edge mask a row
constexpr int kMaxTaps = 256;                            // mixture entries collected before they are summed
constexpr int kTapsAtOnce = 32;
constexpr int64_t kChunkPixels = 256;  // summed in float32 before going to double
// Outputs larger than this do not stay in a cache until the next layer reads them: they are written
// around it, which saves reading every line before it is overwritten.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// What one output pixel is the sum of: init + all sums + all weighted taps, each a row of the tables.
struct Terms {
  const float* init;
  int sums, taps;
  const float* sum[kMaxSums];
  const float* tap[kMaxTaps];
  float weight[kMaxTaps];
};

// Taps are summed a few at a time: one after another, hundreds would each round at the size of the whole sum.
template <int kVecs>
P2PFAST_INLINE void total(const Terms& t, int64_t c, Vec (&v)[kVecs]) {
  for (int i = 0; i < kVecs; ++i) v[i] = load(t.init + c + i * kLanes);
  for (int j = 0; j < t.sums; ++j) {
    const float* const row = t.sum[j] + c;
    for (int i = 0; i < kVecs; ++i) v[i] += load(row + i * kLanes);
  }
  for (int from = 0; from < t.taps; from += kTapsAtOnce) {
    const int to = min2(from + kTapsAtOnce, t.taps);
    Vec part[kVecs] = {};
    for (int j = from; j < to; ++j) {
      const float* const row = t.tap[j] + c;
      const Vec w = splat(t.weight[j]);
      for (int i = 0; i < kVecs; ++i) part[i] += w * load(row + i * kLanes);
    }
    for (int i = 0; i < kVecs; ++i) v[i] += part[i];
  }
}

// Makes room: replaces the terms by their sum.
void collapse(Terms& t, float* sum, int64_t stride) {
  for (int64_t c = 0; c < stride; c += kLanes) {
    Vec v[1];
    total(t, c, v);
    store(sum + c, v[0]);
  }
  t.init = sum;
  t.sums = t.taps = 0;
}

// Mean and squared deviations of a band. Windows of one label are only counted; the others are
// summed in float32 around a pivot near their mean, a chunk at a time, and chunks merge in double by
// Chan's formula.
struct Statistics {
  float *pivot, *sum, *squares;
  double *mean, *m2;
  int64_t stride;
  int64_t pixels;   // merged
  int64_t pending;  // in sum and squares
  int64_t limit;  // pending pixels at which to merge; grows, so that an odd first pixel is no pivot for long

  void merge(int64_t c, double count, double total_count, double chunk_mean, double chunk_m2) {
    const double delta = chunk_mean - mean[c];
    mean[c] += delta * (count / total_count);
    m2[c] += chunk_m2 + delta * delta * (count * static_cast<double>(pixels) / total_count);
  }

  void flush() {
    if (pending == 0) return;
    const double n = static_cast<double>(pending);
    const double all = static_cast<double>(pixels + pending);
    for (int64_t c = 0; c < stride; ++c) {
      const double shift = sum[c] / n;
      const double deviations = pending == 1 ? 0 : squares[c] - shift * sum[c];
      merge(c, n, all, pivot[c] + shift, deviations < 0 ? 0 : deviations);
      pivot[c] = static_cast<float>(mean[c]);
      sum[c] = squares[c] = 0;
    }
    pixels += pending;
    pending = 0;
    limit = min2(8 * limit, kChunkPixels);
  }

  void add_constant(const float* value, int64_t count) {
    const double n = static_cast<double>(count), all = static_cast<double>(pixels + count);
    for (int64_t c = 0; c < stride; ++c) merge(c, n, all, value[c], 0);
    pixels += count;
  }
};

template <class T>
struct StoredVec;
template <>
struct StoredVec<float> {
  typedef Vec type;
};
template <>
struct StoredVec<bf16> {
  typedef VecH type;
};

template <class T>
P2PFAST_INLINE typename StoredVec<T>::type rounded(Vec v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    VecH h;
    store(reinterpret_cast<bf16*>(&h), v);
    return h;
  }
}

// Writes around the cache where the processor can; p is aligned to sizeof(V).
template <class V>
P2PFAST_INLINE void stream(void* p, V v) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#ifdef __AVX2__
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#ifdef __SSE2__
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#ifdef __x86_64__
  if constexpr (sizeof(V) == 8) return _mm_stream_si64(static_cast<long long*>(p), (long long)v);
#endif
#endif
  std::memcpy(p, &v, sizeof(V));
}

template <class T, int kVecs>
P2PFAST_INLINE void write_pixel(const Terms& t, int64_t c, T* out, Statistics* statistics, bool streaming) {
  Vec v[kVecs];
  total(t, c, v);
  if (statistics != nullptr) {
    for (int i = 0; i < kVecs; ++i) {
      const int64_t k = c + i * kLanes;
      const Vec d = v[i] - load(statistics->pivot + k);
      store(statistics->sum + k, load(statistics->sum + k) + d);
      store(statistics->squares + k, load(statistics->squares + k) + d * d);
    }
  }
  for (int i = 0; i < kVecs; ++i) {
    if (streaming) {
      stream(out + c + i * kLanes, rounded<T>(v[i]));
    } else {
      store(out + c + i * kLanes, v[i]);
    }
  }
}

template <class T, int kVecs>
P2PFAST_INLINE void write_run(const float* value, int64_t c, int64_t stride, int64_t pixels, T* out,
                              bool streaming) {
  typedef typename StoredVec<T>::type Stored;
  Stored v[kVecs];
  for (int i = 0; i < kVecs; ++i) v[i] = rounded<T>(load(value + c + i * kLanes));
  out += c;
  if (streaming) {
    for (int64_t x = 0; x < pixels; ++x, out += stride)
      for (int i = 0; i < kVecs; ++i) stream(out + i * kLanes, v[i]);
  } else {
    for (int64_t x = 0; x < pixels; ++x, out += stride)
      for (int i = 0; i < kVecs; ++i) std::memcpy(out + i * kLanes, &v[i], sizeof(Stored));
  }
}

// Calls f.template operator()<vectors>(channel) for blocks of channels that fit the registers.
template <class F>
P2PFAST_INLINE void for_blocks(int64_t stride, F&& f) {
  constexpr int kWide = kLanes == 4 ? 32 : 64;
  int64_t c = 0;
  for (; c + kWide <= stride; c += kWide) f.template operator()<kWide / kLanes>(c);
  if constexpr (kWide > 32) {
    if (c + 32 <= stride) {
      f.template operator()<32 / kLanes>(c);
      c += 32;
    }
  }
  if (c < stride) f.template operator()<16 / kLanes>(c);
}

struct Tables {
  const float *bias, *constants, *sums, *masks;
  int64_t stride;
  int64_t channel_floats;              // of sums: from one channel to the next
  int64_t row_floats;                  // of sums: from one row of the window to the next
  int64_t interval_start[kMaxKernel];  // floats: the sum over taps a..b is at interval_start[a] + b * stride
};

// The rows of the map under a row of output pixels, and the taps of them that are inside the map.
struct WindowRows {
  int64_t begin, end;  // taps
  int64_t y[kMaxKernel];
  const uint8_t* row[kMaxKernel];
  const uint64_t *changes[kMaxKernel], *marks[kMaxKernel], *blends[kMaxKernel], *plain[kMaxKernel];
  const uint64_t* down[kMaxKernel];  // between row i and row i + 1 of the window
};

WindowRows window_rows(const Prepared& m, int64_t y) {
  WindowRows r;
  r.begin = m.reflect ? 0 : max2<int64_t>(0, m.padding - y);
  r.end = m.reflect ? m.kernel : min2(m.kernel, m.height + m.padding - y);
  for (int64_t d = r.begin; d < r.end; ++d) {
    const int64_t i = reflected(y + d - m.padding, m.height);
    r.y[d] = i;
    r.row[d] = m.rows + i * m.row_bytes;
    r.changes[d] = m.changes + i * m.row_words;
    r.marks[d] = m.marks + i * m.row_words;
    r.blends[d] = m.blends + i * m.row_words;
    r.plain[d] = m.plain + i * m.row_words;
    if (d > r.begin) r.down[d - 1] = m.down + min2(i, r.y[d - 1]) * m.row_words;
  }
  return r;
}

// Bit x: the window of pixel 64 * word + x holds one label, no mark and no padded tap.
P2PFAST_INLINE uint64_t uniform_windows(const Prepared& m, const WindowRows& r, int64_t word) {
  if (r.end - r.begin < m.kernel) return 0;
  uint64_t u = r.plain[0][word];
  for (int64_t d = 1; d < m.kernel; ++d) u &= r.plain[d][word] & ~r.down[d - 1][word];
  return u;
}

// Collects the terms of pixel x. kPooled: marked pixels have entries, which replace the label of a
// blend; else marks are edges.
template <bool kPooled>
P2PFAST_INLINE void collect(const Prepared& m, const Pixels& pixels, const Tables& tables,
                            const WindowRows& r, int64_t x, float* spare, Terms& t) {
  const int a0 = m.reflect ? 0 : static_cast<int>(max2<int64_t>(0, m.padding - x));
  const int b0 = static_cast<int>(m.reflect ? m.kernel - 1 : min2(m.kernel - 1, m.width - 1 + m.padding - x));
  const uint32_t inside = ((2u << b0) - 1u) & ~((1u << a0) - 1u);
  const int64_t stride = tables.stride, channel_floats = tables.channel_floats;
  const float* sums = tables.sums + r.begin * tables.row_floats;
  t.init = tables.bias;
  t.sums = t.taps = 0;
  for (int64_t d = r.begin; d < r.end; ++d, sums += tables.row_floats) {
    const uint8_t* const labels = r.row[d] + x;
    const uint32_t marks = bits_at(r.marks[d], x) & inside;
    // Bits of the taps that end a run.
    uint32_t ends = (bits_at(r.changes[d], x) & inside) | (1u << b0);
    uint32_t blends = 0;
    if constexpr (kPooled) {
      blends = bits_at(r.blends[d], x) & inside;
      ends |= blends | ((blends >> 1) & inside);
    }
    for (int a = a0; ends != 0; ends &= ends - 1) {
      const int b = __builtin_ctz(ends);
      if ((blends >> b & 1u) == 0)
        t.sum[t.sums++] = sums + labels[b] * channel_floats + tables.interval_start[a] + b * stride;
      a = b + 1;
    }
    if constexpr (kPooled) {
      const int32_t* const first = pixels.first + r.y[d] * m.width;
      const Entry* const entries = pixels.entries + r.y[d] * pixels.row_entries;
      const auto entry = [&](int tap) { return first[reflected(x + tap - m.padding, m.width)]; };
      for (uint32_t left = marks; left != 0;) {
        const int a = __builtin_ctz(left);
        const int32_t at = entry(a);
        int b = a;
        while ((left >> (b + 1) & 1u) != 0 && entry(b + 1) == at) ++b;
        left &= ~((2u << b) - 1u);
        const float* const tap = sums + tables.interval_start[a] + b * stride;
        const Entry* e = entries + at;
        do {
          if (t.taps == kMaxTaps) collapse(t, spare, stride);
          t.tap[t.taps] = tap + e->offset;
          t.weight[t.taps++] = e->weight;
        } while ((e++)->last == 0);
      }
    } else if (marks != 0) {
      t.sum[t.sums++] = tables.masks + ((d << m.kernel) + marks) * stride;
    }
  }
}

struct Target {
  int64_t begin, end;  // rows
  void* out;           // of this image, from row begin on
  float* partials;
  uint8_t* uniform;
  bool streaming;
};

template <class T, bool kPooled>
void convolve_band(const Prepared& m, const Pixels& pixels, const Tables& tables, const Target& target,
                   int64_t band, int64_t band_rows, uint8_t* task_memory) {
  const int64_t stride = tables.stride;
  const bool streaming = target.streaming;
  float* const floats = reinterpret_cast<float*>(task_memory);
  double* const doubles = reinterpret_cast<double*>(floats + 4 * stride);
  int64_t* const counts = reinterpret_cast<int64_t*>(doubles + 2 * stride);
  Statistics s{floats, floats + stride, floats + 2 * stride, doubles, doubles + stride, stride, 0, 0, 1};
  float* const spare = floats + 3 * stride;
  Statistics* const statistics = target.partials != nullptr ? &s : nullptr;
  if (statistics != nullptr)
    std::memset(task_memory, 0, static_cast<size_t>(stride * 32 + kLabelConvMaxClasses * 8));

  Terms terms;
  const int64_t y_end = min2(target.begin + (band + 1) * band_rows, target.end);
  for (int64_t y = target.begin + band * band_rows; y < y_end; ++y) {
    const WindowRows rows = window_rows(m, y);
    const uint8_t* const centre = m.rows + y * m.row_bytes + m.padding;
    const int64_t row = y - target.begin;
    T* const out = static_cast<T*>(target.out) + row * m.width * stride;
    uint8_t* const uniform = target.uniform != nullptr ? target.uniform + row * m.width : nullptr;
    for (int64_t word = 0; 64 * word < m.width; ++word) {
      const uint64_t windows = uniform_windows(m, rows, word);
      const int64_t end = min2(64 * (word + 1), m.width);
      for (int64_t x = 64 * word; x < end;) {
        const uint64_t left = windows >> (x & 63);
        if ((left & 1) != 0) {
          // Neighbouring windows overlap unless they are single pixels: a run has one label.
          int64_t run = ~left == 0 ? 64 : __builtin_ctzll(~left);
          run = m.kernel == 1 ? 1 : min2(run, end - x);
          const int label = centre[x];
          const float* const value = tables.constants + label * stride;
          for_blocks(stride, [&]<int kVecs>(int64_t c) __attribute__((always_inline)) {
            write_run<T, kVecs>(value, c, stride, run, out + x * stride, streaming);
          });
          if (uniform != nullptr) std::memset(uniform + x, label, static_cast<size_t>(run));
          if (statistics != nullptr) counts[label] += run;
          x += run;
          continue;
        }
        collect<kPooled>(m, pixels, tables, rows, x, spare, terms);
        if (statistics != nullptr && s.pixels + s.pending == 0) {
          // Any value of the right size serves as the first pivot.
          std::memcpy(s.pivot, tables.constants + centre[x] * stride, static_cast<size_t>(stride) * 4);
        }
        for_blocks(stride, [&]<int kVecs>(int64_t c) __attribute__((always_inline)) {
          write_pixel<T, kVecs>(terms, c, out + x * stride, statistics, streaming);
        });
        if (uniform != nullptr) uniform[x] = 255;
        if (statistics != nullptr && ++s.pending == s.limit) s.flush();
        ++x;
      }
    }
  }
#ifdef __SSE2__
  if (streaming) _mm_sfence();
#endif
  if (statistics == nullptr) return;
  s.flush();
  for (int64_t label = 0; label < kLabelConvMaxClasses; ++label)
    if (counts[label] != 0) s.add_constant(tables.constants + label * stride, counts[label]);
  float* const partial = target.partials + band * 2 * stride;
  for (int64_t c = 0; c < stride; ++c) {
    partial[c] = static_cast<float>(s.mean[c]);
    partial[stride + c] = static_cast<float>(s.m2[c]);
  }
}

template <class T, bool kPooled>
void convolve(const Prepared& m, const Pixels& pixels, const Tables& tables, const Target& target,
              const LabelConvScratch& k, uint8_t* scratch) {
  parallel_for(ceil_div(target.end - target.begin, k.band_rows), [&](int64_t task, int) {
    convolve_band<T, kPooled>(m, pixels, tables, target, task, k.band_rows,
                              scratch + k.task + task * k.task_bytes);
  });
}

void run(const LabelConvArgs& args) {
  const LabelConvShape& shape = args.shape;
  const LabelConvLayout layout = label_conv_layout(shape);
  const LabelConvScratch k = label_conv_scratch(shape);
  uint8_t* const scratch = static_cast<uint8_t*>(args.scratch);

  Prepared m;
  m.height = layout.out_height;
  m.width = layout.out_width;
  m.kernel = shape.kernel;
  m.padding = (shape.kernel - 1) / 2;
  m.reflect = shape.reflect;
  m.row_bytes = k.row_bytes;
  m.row_words = k.row_words;
  m.rows = scratch + k.rows;
  m.changes = reinterpret_cast<uint64_t*>(scratch + k.changes);
  m.marks = reinterpret_cast<uint64_t*>(scratch + k.marks);
  m.blends = reinterpret_cast<uint64_t*>(scratch + k.blends);
  m.plain = reinterpret_cast<uint64_t*>(scratch + k.plain);
  m.down = reinterpret_cast<uint64_t*>(scratch + k.down);

  Tables tables;
  tables.bias = args.packed + layout.bias;
  tables.constants = args.packed + layout.constants;
  tables.sums = args.packed + layout.sums;
  tables.masks = args.packed + layout.masks;
  tables.stride = layout.stride;
  tables.channel_floats = layout.intervals * layout.stride;
  tables.row_floats = layout.channels * tables.channel_floats;
  tables.interval_start[0] = 0;
  for (int a = 1; a < shape.kernel; ++a)
    tables.interval_start[a] = tables.interval_start[a - 1] + (shape.kernel - a) * layout.stride;

  const int64_t begin = args.row_begin, end = args.row_end > 0 ? args.row_end : m.height;
  const int64_t rows = end - begin, bands = shape.band_rows > 0 ? ceil_div(rows, shape.band_rows) : 0;
  // Rows that windows of these rows see, those that padding reflects among them.
  const int64_t first = max2<int64_t>(0, begin - m.padding), last = min2(m.height, end + m.padding);
  const int64_t pixel_bytes = layout.stride * (args.out_bf16 ? 2 : 4);
  const int64_t image_bytes = rows * m.width * pixel_bytes;
  const bool streaming =
      shape.batch * image_bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(args.out) % 64 == 0;
  const Channels channels{static_cast<uint32_t>(tables.channel_floats), static_cast<uint32_t>(shape.classes)};
  for (int64_t n = 0; n < shape.batch; ++n) {
    Pixels pixels{shape.height,
                  shape.width,
                  args.labels + n * shape.height * shape.width,
                  shape.has_edges ? args.edges + n * shape.height * shape.width : nullptr,
                  nullptr,
                  nullptr,
                  0};
    for (int i = 0; i < shape.pool_levels; ++i) pixels = pool(pixels, k.pools[i], scratch, channels);
    parallel_for(ceil_div(last - first, k.prepare_rows), [&](int64_t task, int) {
      const int64_t stop = min2(first + (task + 1) * k.prepare_rows, last);
      for (int64_t y = first + task * k.prepare_rows; y < stop; ++y)
        prepare_row(m, pixels, y, scratch + k.task + task * k.task_bytes);
    });
    const Target target{begin,
                        end,
                        static_cast<uint8_t*>(args.out) + n * image_bytes,
                        args.partials != nullptr ? args.partials + n * bands * 2 * layout.stride : nullptr,
                        args.uniform != nullptr ? args.uniform + n * rows * m.width : nullptr,
                        streaming};
    const auto convolution = args.out_bf16
                                 ? (shape.pool_levels > 0 ? convolve<bf16, true> : convolve<bf16, false>)
                                 : (shape.pool_levels > 0 ? convolve<float, true> : convolve<float, false>);
    convolution(m, pixels, tables, target, k, scratch);
  }
}

// All sums are taken in double and rounded once.
void pack(const LabelConvShape& shape, const float* weight, const float* bias, float* packed) {
  const LabelConvLayout layout = label_conv_layout(shape);
  const int64_t k = shape.kernel, stride = layout.stride, taps = k * k;
  std::memset(packed, 0, static_cast<size_t>(layout.packed_floats) * 4);
  if (bias != nullptr) std::memcpy(packed + layout.bias, bias, static_cast<size_t>(shape.cout) * 4);
  parallel_for(layout.channels, [&](int64_t channel, int) {
    const bool edges = channel == shape.classes;
    for (int64_t o = 0; o < shape.cout; ++o) {
      const float* const w = weight + (o * layout.channels + channel) * taps;
      double all = packed[layout.bias + o];
      for (int64_t d = 0; d < k; ++d) {
        float* at = packed + layout.sums + (d * layout.channels + channel) * layout.intervals * stride + o;
        for (int64_t a = 0; a < k; ++a) {
          double sum = 0;
          for (int64_t b = a; b < k; ++b, at += stride) {
            sum += w[d * k + b];
            *at = static_cast<float>(sum);
          }
          all += w[d * k + a];
        }
        if (!edges) continue;
        float* const masks = packed + layout.masks + (d << k) * stride + o;
        for (int64_t mask = 0; mask < int64_t{1} << k; ++mask) {
          double sum = 0;
          for (int64_t b = 0; b < k; ++b)
            if ((mask >> b & 1) != 0) sum += w[d * k + b];
          masks[mask * stride] = static_cast<float>(sum);
        }
      }
      if (!edges) packed[layout.constants + channel * stride + o] = static_cast<float>(all);
    }
  });
}

int max_label(const uint8_t* labels, int64_t count) {
  constexpr int64_t kPart = int64_t{1} << 18;
  uint8_t largest = 0;
  parallel_for(ceil_div(count, kPart), [&](int64_t task, int) {
    uint8_t here = 0;
    const int64_t end = min2((task + 1) * kPart, count);
    for (int64_t i = task * kPart; i < end; ++i) here = max2(here, labels[i]);
    uint8_t seen = __atomic_load_n(&largest, __ATOMIC_RELAXED);
    while (seen < here &&
           !__atomic_compare_exchange_n(&largest, &seen, here, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  });
  return largest;
}

}  // namespace

const LabelConvKernels label_conv = {pack, max_label, run};

}  // namespace p2pfast::P2PFAST_LEVEL
