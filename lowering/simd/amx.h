// AMX beside AVX-512: products of 16 rows with up to 16 others at a time, for templates/tiled_stream.h.jinja. Assembler, since GCC's
// intrinsics do not say that they read and write memory.
//
// A tile is 16 rows of 64 bytes. dot_bfloat16<C, A, B> adds to tile C, of floats, the products of A's rows with B's columns, where
// B holds pairs: row p of B is, for each column, its numbers 2 p and 2 p + 1. A session says how many rows tiles 0 to 3 have; 4 to 7
// have 16. Denormal numbers count as zero.
#ifdef EMULATED_TILES
namespace tiles {
using namespace emulated_tiles;
}
#else
namespace tiles {
template <int T>
static inline void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
static inline void dot_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static inline void configure(const Shapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
static inline void release() { asm volatile("tilerelease"); }
/// The kernel's leave, once per process, to keep tiles; it says no where a signal's stack is too small for them.
static inline bool permitted() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }
}  // namespace tiles
#endif

namespace tiles {
constexpr int ROWS = 16, BYTES = 64;

static bool usable() {
  static const bool answer = permitted();
  return answer;
}

/// A thread's use of tiles, of which the first four have `rows` rows.
struct Session {
  explicit Session(int rows) {
    if (!usable()) return;
    Shapes shapes;
    for (int t = 0; t < 8; ++t) shapes.row_bytes[t] = BYTES, shapes.rows[t] = (uint8_t)(t < 4 ? rows : ROWS);
    configure(shapes);
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() {
    if (usable()) release();
  }
};
}  // namespace tiles

/// p[places[i]] in lane i.
static inline vf gather(const float* p, vi places) { return (vf)_mm512_i32gather_ps((__m512i)places, p, 4); }
