#include "bindings.h"

NB_MODULE(_native, m) {
  localds::bind_experts(m);
  localds::bind_kernels(m);
  localds::bind_ops(m);
  localds::bind_profile(m);
  localds::bind_sources(m);
}
