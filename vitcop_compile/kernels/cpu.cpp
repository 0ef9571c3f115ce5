// Products of few rows and attention of one query on a CPU, at the rate at which memory is read.

#include "attention.h"
#include "bytes.h"
#include "products.h"

STABLE_TORCH_LIBRARY(vitcop_cpu, m) {
  m.def("linear_few(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_int8(Tensor input, Tensor weight) -> Tensor");
  m.def("decode_attention(Tensor query, Tensor key, Tensor value, float scale, Tensor at) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(vitcop_cpu, CPU, m) {
  m.impl("linear_few", TORCH_BOX(&linear_few));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}
