// Python's view of where the time goes, and of what the machine can do at best.
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bindings.h"
#include "peaks.h"
#include "profile.h"

using namespace nanobind::literals;

namespace localds {

void bind_profile(nb::module_& m) {
  nb::class_<ProfiledStep>(m, "ProfiledStep")
      .def_ro("name", &ProfiledStep::name)
      .def_ro("calls", &ProfiledStep::calls)
      .def_ro("seconds", &ProfiledStep::seconds)
      .def_prop_ro("bytes", [](const ProfiledStep& s) { return s.work.bytes; })
      .def_prop_ro("int8", [](const ProfiledStep& s) { return s.work.int8; })
      .def_prop_ro("floats", [](const ProfiledStep& s) { return s.work.floats; });
  nb::class_<Peaks>(m, "Peaks")
      .def_ro("read", &Peaks::read)
      .def_ro("int8", &Peaks::int8)
      .def_ro("floats", &Peaks::floats);
  m.def("take_profile", take_profile, nb::call_guard<nb::gil_scoped_release>());
  m.def("measure_peaks", measure_peaks, "nbytes"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace localds
