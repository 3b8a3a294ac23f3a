#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu/instance_edges.h"
#include "cpu/parallel.h"
#include "cuda/instance_edges_kernel.h"
#include "emulate.h"
#include "testing.h"

namespace {

using p2pfast::InstanceEdges;

template <class T>
std::vector<uint8_t> naive(const T* ids, int64_t images, int64_t height, int64_t width, int64_t image_stride,
                           int64_t row_stride) {
  std::vector<uint8_t> edges;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        const T* const here = ids + n * image_stride + y * row_stride + x;
        const bool edge = (x > 0 && here[-1] != *here) || (x + 1 < width && here[1] != *here) ||
                          (y > 0 && here[-row_stride] != *here) ||
                          (y + 1 < height && here[row_stride] != *here);
        edges.push_back(edge ? 1 : 0);
      }
    }
  }
  return edges;
}

// The buffers hold exactly what may be touched, so that AddressSanitizer sees a pixel too many.
template <class T>
void compare(int64_t images, int64_t height, int64_t width, int64_t padding) {
  p2pfast::testing::Random random(static_cast<uint64_t>(height * 1000 + width));
  const int64_t row_stride = width + padding;
  const int64_t image_stride = height * row_stride;
  std::vector<T> ids(static_cast<size_t>(images * image_stride - padding));
  for (T& id : ids) {
    const T values[] = {std::numeric_limits<T>::max(), std::numeric_limits<T>::min(), T{0}, T{1}};
    id = values[random.below(random.below(3) == 0 ? 4 : 1)];
  }
  std::vector<uint8_t> edges(static_cast<size_t>(images * height * width), 255);
  p2pfast::instance_edges({ids.data(), static_cast<int>(sizeof(T)), edges.data(), images, height, width,
                           image_stride, row_stride});
  const std::vector<uint8_t> expected = naive(ids.data(), images, height, width, image_stride, row_stride);
  CHECK(edges == expected);
  std::fill(edges.begin(), edges.end(), uint8_t{255});
  p2pfast::cuda::run_instance_edges({ids.data(), static_cast<int>(sizeof(T)), edges.data(), images, height,
                                     width, image_stride, row_stride},
                                    []<class Kernel>(const typename Kernel::Args& args, int64_t blocks) {
                                      p2pfast::testing::emulate<Kernel>(args, blocks);
                                    });
  CHECK(edges == expected);
}

TEST(instance_edges_matches_naive) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const int threads : {1, 3}) {
      p2pfast::set_num_threads(threads);
      for (const int64_t width : {1, 2, 3, 15, 16, 17, 31, 64, 65, 200}) {
        for (const int64_t height : {1, 2, 5}) {
          compare<uint8_t>(2, height, width, 0);
          compare<int16_t>(2, height, width, 3);
          compare<int32_t>(2, height, width, 1);
          compare<uint64_t>(2, height, width, 0);
        }
      }
      compare<int32_t>(2, 400, 513, 7);  // several bands an image
    }
  });
  p2pfast::set_num_threads(2);
}

TEST(instance_edges_checks_its_arguments) {
  const std::vector<int32_t> ids(4);
  std::vector<uint8_t> edges(4);
  const InstanceEdges good{ids.data(), 4, edges.data(), 1, 2, 2, 4, 2};
  const auto with = [&](auto change) {
    InstanceEdges args = good;
    change(args);
    return args;
  };
  p2pfast::instance_edges(good);
  using Bad = std::invalid_argument;
  CHECK_THROWS(p2pfast::instance_edges(with([](auto& a) { a.images = -1; })), Bad, "images is -1");
  CHECK_THROWS(p2pfast::instance_edges(with([](auto& a) { a.element_size = 3; })), Bad, "element_size is 3");
  CHECK_THROWS(p2pfast::instance_edges(with([](auto& a) { a.ids = nullptr; })), Bad, "ids is a null pointer");
  CHECK_THROWS(p2pfast::instance_edges(with([](auto& a) { a.edges = nullptr; })), Bad,
               "edges is a null pointer");
  CHECK_THROWS(p2pfast::instance_edges(with([](auto& a) { a.height = INT64_MAX; })), Bad, "64 bits");
  p2pfast::instance_edges(with([](auto& a) {
    a.width = 0;
    a.ids = nullptr;
  }));
}

}  // namespace
