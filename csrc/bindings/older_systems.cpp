// The few symbols of libstdc++ and glibc that torch's headers need and that manylinux_2_28 lacks, so that the extension
// loads there wherever it was built. exports.map keeps them inside: other libraries use the system's.
#include <new>
#include <sstream>

#if defined(__linux__) && defined(__GLIBCXX__) && _GLIBCXX_USE_CXX11_ABI

extern "C" {

// glibc 2.32: whether the process has one thread. shared_ptr counts without atomics then; with 0 it never does.
char __libc_single_threaded = 0;

// GCC 9 (GLIBCXX_3.4.26): the constructors of streams without arguments. Those with a mode are older.
void make_ostringstream(void* self) __asm__("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_ostringstream(void* self) { new (self) std::ostringstream(std::ios_base::out); }
void make_stringstream(void* self) __asm__("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_stringstream(void* self) { new (self) std::stringstream(std::ios_base::in | std::ios_base::out); }
}

// GCC 11 (GLIBCXX_3.4.29).
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

#endif
