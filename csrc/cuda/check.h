// Errors of the CUDA runtime as exceptions, and the device a call runs on.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace p2pfast::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::string message =
      std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")";
  if (status == cudaErrorNoKernelImageForDevice) {
    message += "; p2pfast is built for compute capability 8.0 and later";
  } else if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice) {
    message +=
        "; CUDA kernels need an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000);
  }
  throw std::runtime_error(message);
}

// The module links its own CUDA runtime, which does not know the device torch has selected.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check(cudaGetDevice(&previous_), what);
    if (device != previous_) {
      check(cudaSetDevice(device), what);
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace p2pfast::cuda
