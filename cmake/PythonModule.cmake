# The module p2pfast._C. Every csrc/bindings/<name>.cpp defines bind_<name>(module); the list of
# calls is generated, so that adding a file is enough.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

file(GLOB binding_sources CONFIGURE_DEPENDS csrc/bindings/*.cpp)
set(P2PFAST_BINDINGS)
foreach(source IN LISTS binding_sources)
  get_filename_component(stem ${source} NAME_WE)
  string(APPEND P2PFAST_BINDINGS "P2PFAST_BIND(${stem})\n")
endforeach()
file(CONFIGURE OUTPUT generated/bindings.inc CONTENT "${P2PFAST_BINDINGS}" @ONLY)

pybind11_add_module(_C MODULE NO_EXTRAS csrc/bindings.cpp ${binding_sources})
target_link_libraries(_C PRIVATE p2pfast_native)
# Bindings only hand numbers over; most of their build time would go into optimising pybind11.
target_compile_options(_C PRIVATE -O1)
target_include_directories(_C PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated)
if(P2PFAST_CUDA_OBJECTS)
  target_sources(_C PRIVATE ${P2PFAST_CUDA_OBJECTS})
  target_link_libraries(_C PRIVATE ${P2PFAST_CUDA_LIBRARIES})
endif()

set_source_files_properties(
  csrc/bindings/runtime.cpp
  PROPERTIES
    COMPILE_DEFINITIONS
    "P2PFAST_BUILD_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\";P2PFAST_BUILD_TYPE=\"${CMAKE_BUILD_TYPE}\";P2PFAST_CUDA_ARCHITECTURES=\"${P2PFAST_CUDA_ARCHITECTURES}\";P2PFAST_CUDA_REASON=\"${P2PFAST_CUDA_REASON}\";P2PFAST_CUDA_VERSION=\"${P2PFAST_CUDA_VERSION}\""
)
