// The mean of the features over each instance of an image, written to all of its pixels: the instance-wise
// average pooling of pix2pixHD's encoder. Mathematics: p2pfast/ops/instance_pool/README.md.
#pragma once

#include <cstdint>

namespace p2pfast {

// Numbers the instances of each image from where those of the image before end, in order of appearance.
// ids: (images, pixels) dense integers of element_size 1, 2, 4 or 8 bytes, of which only equality matters;
// writes regions (images, pixels) and first (images + 1), the number of each image's first region.
// Throws std::invalid_argument, naming what is wrong.
void instance_regions(const void* ids, int element_size, int64_t images, int64_t pixels, int32_t* regions,
                      int64_t* first);

// Element (n, c, p) of features and out is at n * image_stride + c * channel_stride + p * pixel_stride.
struct InstancePool {
  const float* features;
  float* out;
  int64_t images, channels, pixels;
  int64_t image_stride, channel_stride, pixel_stride;
  const int32_t* regions;  // of instance_regions
  const int64_t* first;
};

// Sums are taken in double in the order of the pixels: the same bits at any number of threads. Runs on the
// calling thread's pool. Throws std::invalid_argument, naming what is wrong.
void instance_pool(const InstancePool& args);

}  // namespace p2pfast
