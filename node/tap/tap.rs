//! The tap: a small library that a QEMU is started with. It takes the place of the C
//! library's file functions for one file, the record/replay log, and sees every byte
//! of it with the thread that writes or reads it.
//!
//! ```text
//! the ring, a file that both sides map                        one page, then two rings
//!   0 "HDLT" | 4 version | 8 mode | 12 stage | 16 pid | 24 bytes ring | 32 marks ring | 40 node's pid
//!  64 written or read offset   | 72 marks written                by the tap
//! 128 taken offset             | 136 marks taken                 by the node
//! 256 path of the program, 1024 bytes
//! bytes ring: the log by its offset, modulo the ring           (recording alone)
//! marks ring: u64 offset << 8 | thread: from here on, that thread
//! ```
//! Threads: 0 runs TCG, 1 called `main`, 2 neither. A recording writes no file: its
//! bytes go to the ring, and wait there if the node takes none. A replay reads the file
//! it was given, byte for byte, and only says how far it is and on which thread.
//! QEMU serialises all access to the log with its replay lock; the tap relies on that.
//!
//! In a replay the tap also keeps the main loop asleep, in the poll where it holds no
//! lock, while the log has work for the vCPU thread alone: QEMU's two threads would
//! otherwise take turns at every event. The ranges of the log where that is so come from
//! the node, as pairs of offsets in the file that HEDDLE_TAP_HOLDS names.
//!
//! No dependency but the C library. Nothing here may allocate or fail on the hot path.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI64, AtomicPtr, AtomicU32, AtomicU64, Ordering};

type File = c_void;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn getenv(name: *const c_char) -> *mut c_char;
    fn unsetenv(name: *const c_char) -> c_int;
    fn open64(path: *const c_char, flags: c_int, ...) -> c_int;
    fn close(fd: c_int) -> c_int;
    fn mmap64(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64;
    fn readlink(path: *const c_char, out: *mut c_char, len: usize) -> isize;
    fn getpid() -> c_int;
    fn gettid() -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn usleep(microseconds: u32) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn _exit(code: c_int) -> !;
    fn strcmp(a: *const c_char, b: *const c_char) -> c_int;
}

const RTLD_NEXT: *mut c_void = -1isize as *mut c_void;
const PR_GET_NAME: c_int = 16;
const PR_SET_PDEATHSIG: c_int = 1;
const SIGKILL: c_int = 9;
const READ_WRITE: c_int = 2;
const PROT_READ: c_int = 1;
const PROT_READ_WRITE: c_int = 3;
const MAP_SHARED: c_int = 1;
const EOF: c_int = -1;
const VERSION: u32 = 1;
const PAGE: usize = 4096;

#[cfg(target_arch = "x86_64")]
const SYS_FUTEX: c_long = 202;
#[cfg(not(target_arch = "x86_64"))]
const SYS_FUTEX: c_long = 98;
const FUTEX_WAIT_PRIVATE: c_int = 128;
const FUTEX_WAKE_PRIVATE: c_int = 129;
/// A range in which nothing moves for so long is left: somebody may want to ask something.
static HOLD: Timespec = Timespec { seconds: 0, nanoseconds: 20_000_000 };

/// How long a replay's main loop may sleep before it looks at the log again: the first,
/// if the log has moved since the last time, and twice as long every time it has not.
const NAP_MIN_NANOSECONDS: c_long = 50_000;
const NAP_MAX_NANOSECONDS: c_long = 4_000_000;

/// The same where a shutdown comes, on which a main loop that is awake would act too soon.
static STRICT_HOLD: Timespec = Timespec { seconds: 2, nanoseconds: 0 };
/// The mark of such a range, in its end.
const STRICT: u64 = 1 << 63;

#[repr(C)]
struct Timespec {
    seconds: c_long,
    nanoseconds: c_long,
}

const VCPU: u8 = 0;
const IOTHREAD: u8 = 1;
const OTHER: u8 = 2;
/// Never touches the log.
const MONITOR: u8 = 3;
/// How often the monitor's thread looks for a question in a replay: QEMU wakes it at
/// every event, for nothing.
const MONITOR_NAP_MICROSECONDS: u32 = 2000;

const MODE_RECORD: u32 = 1;
/// The library was loaded.
const STAGE_LOADED: u32 = 1;
/// The log was opened through it.
const STAGE_OPEN: u32 = 2;
/// The log was closed.
const STAGE_CLOSED: u32 = 3;

static RING: AtomicPtr<u8> = AtomicPtr::new(null_mut());
/// The stream QEMU holds for the log: a real one, so that nothing else mistakes it.
static LOG: AtomicPtr<File> = AtomicPtr::new(null_mut());
/// The log's bytes in a replay.
static MAP: AtomicPtr<u8> = AtomicPtr::new(null_mut());
static MAP_BYTES: AtomicU64 = AtomicU64::new(0);
/// Where the stream stands, and the end of what was written.
static AT: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);
static IS_AT_EOF: AtomicU32 = AtomicU32::new(0);
/// Ranges of the log that are the vCPU thread's alone, and the first not yet passed.
static HOLDS: AtomicPtr<u64> = AtomicPtr::new(null_mut());
static HOLD_COUNT: AtomicU64 = AtomicU64::new(0);
static HOLD_NEXT: AtomicU64 = AtomicU64::new(0);
/// The offset at which the sleeping main loop is woken; the futex it sleeps on.
static WAKE_AT: AtomicU64 = AtomicU64::new(u64::MAX);
static SLEEPER: AtomicU32 = AtomicU32::new(0);
/// Where the log stood when a hold ended in vain: the guest computes, or is stopped and
/// somebody asks something.
static STILL_AT: AtomicU64 = AtomicU64::new(u64::MAX);
/// Where it stood when the monitor's thread polled last.
static POLLED_AT: AtomicU64 = AtomicU64::new(u64::MAX);
/// The main loop's last nap, and where the log stood then.
static NAP: AtomicI64 = AtomicI64::new(0);
static NAPPED_AT: AtomicU64 = AtomicU64::new(0);
/// The last mark: where the next byte of the same thread would need none.
static MARKED: AtomicU64 = AtomicU64::new(u64::MAX);
static MARKED_NEXT: AtomicU64 = AtomicU64::new(u64::MAX);

thread_local! {
    static THREAD: Cell<u8> = const { Cell::new(u8::MAX) };
}

fn field<'a>(at: usize) -> Option<&'a AtomicU64> {
    let ring = RING.load(Ordering::Relaxed);
    // SAFETY: the ring is mapped for the process's life and at least a page long.
    (!ring.is_null()).then(|| unsafe { &*ring.add(at).cast::<AtomicU64>() })
}

fn word<'a>(at: usize) -> Option<&'a AtomicU32> {
    let ring = RING.load(Ordering::Relaxed);
    // SAFETY: as above.
    (!ring.is_null()).then(|| unsafe { &*ring.add(at).cast::<AtomicU32>() })
}

/// Which thread this is. QEMU names the TCG thread with `-name debug-threads=on`.
fn thread() -> u8 {
    THREAD.with(|known| {
        if known.get() != u8::MAX {
            return known.get();
        }
        let mut name = [0u8; 16];
        // SAFETY: no arguments, and a buffer of the size the call wants.
        let is_main = unsafe {
            prctl(PR_GET_NAME, name.as_mut_ptr());
            getpid() == gettid()
        };
        let is_tcg = name.windows(3).any(|part| part == b"TCG");
        let is_monitor = name.starts_with(b"IO mon");
        let found = match (is_main, is_tcg, is_monitor) {
            (true, _, _) => IOTHREAD,
            (_, true, _) => VCPU,
            (_, _, true) => MONITOR,
            _ => OTHER,
        };
        known.set(found);
        found
    })
}

/// Notes the thread at `offset`, if it is not the one of the byte before.
fn mark(offset: u64) {
    let thread = u64::from(thread());
    let is_same = MARKED.load(Ordering::Relaxed) == thread && MARKED_NEXT.load(Ordering::Relaxed) == offset;
    MARKED_NEXT.store(offset + 1, Ordering::Relaxed);
    if is_same {
        return;
    }
    MARKED.store(thread, Ordering::Relaxed);
    let (Some(bytes), Some(room), Some(written), Some(taken)) = (field(24), field(32), field(72), field(136)) else {
        return;
    };
    let count = written.load(Ordering::Relaxed);
    while count - taken.load(Ordering::Acquire) >= room.load(Ordering::Relaxed) {
        // SAFETY: no memory is involved.
        unsafe { usleep(200) };
    }
    let slot = (count % room.load(Ordering::Relaxed)) as usize;
    let at = PAGE + bytes.load(Ordering::Relaxed) as usize + slot * 8;
    if let Some(mark) = field(at) {
        mark.store(offset << 8 | thread, Ordering::Relaxed);
    }
    written.store(count + 1, Ordering::Release);
}

fn real(slot: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let found = slot.load(Ordering::Relaxed);
    if !found.is_null() {
        return found;
    }
    // SAFETY: the name is terminated.
    let found = unsafe { dlsym(RTLD_NEXT, name.as_ptr()) };
    slot.store(found, Ordering::Relaxed);
    found
}

/// Calls the C library's own function.
macro_rules! next {
    ($name:literal, fn($($kind:ty),*) -> $out:ty, $($argument:expr),*) => {{
        static SLOT: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
        let found = real(&SLOT, $name);
        // SAFETY: the C library's function of this name has this signature.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($kind),*) -> $out>(found)($($argument),*) }
    }};
}

fn is_log(file: *mut File) -> bool {
    let log = LOG.load(Ordering::Relaxed);
    !log.is_null() && file == log
}

fn is_recording() -> bool {
    word(8).is_some_and(|mode| mode.load(Ordering::Relaxed) == MODE_RECORD)
}

/// Maps the ring when the library is loaded, and says which program this is: behind a
/// wrapper script, the last to say so is the real one.
extern "C" fn load() {
    // SAFETY: names are terminated; the mapping is checked before it is used.
    unsafe {
        let path = getenv(c"HEDDLE_TAP_RING".as_ptr());
        if path.is_null() {
            return;
        }
        let fd = open64(path, READ_WRITE);
        if fd < 0 {
            return;
        }
        let bytes = lseek64(fd, 0, 2);
        let ring = mmap64(null_mut(), bytes.max(0) as usize, PROT_READ_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if bytes < PAGE as i64 || ring as isize == -1 {
            return;
        }
        let ring = ring.cast::<u8>();
        let is_ours = std::slice::from_raw_parts(ring, 4) == b"HDLT";
        if !is_ours || (*ring.add(4).cast::<AtomicU32>()).load(Ordering::Relaxed) != VERSION {
            return;
        }
        RING.store(ring, Ordering::Release);
        // An emulator dies with its node; one whose node is gone already never starts.
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        let node = (*ring.add(40).cast::<AtomicU64>()).load(Ordering::Relaxed) as c_int;
        if node > 1 && kill(node, 0) != 0 {
            _exit(1);
        }
        let path = ring.add(256).cast::<c_char>();
        let len = readlink(c"/proc/self/exe".as_ptr(), path, 1023);
        *path.add(len.max(0) as usize) = 0;
        if let (Some(pid), Some(stage)) = (field(16), word(12)) {
            pid.store(getpid() as u64, Ordering::Relaxed);
            stage.store(STAGE_LOADED, Ordering::Release);
        }
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static LOAD: extern "C" fn() = load;

fn is_log_path(path: *const c_char) -> bool {
    if RING.load(Ordering::Acquire).is_null() || path.is_null() {
        return false;
    }
    // SAFETY: both strings are terminated: the caller's, and one of the environment.
    unsafe {
        let wanted = getenv(c"HEDDLE_TAP_LOG".as_ptr());
        !wanted.is_null() && strcmp(path, wanted) == 0
    }
}

/// Maps the log that a replay reads; false if that can't be done.
fn map_log(path: *const c_char) -> bool {
    // SAFETY: the path is terminated; the mapping is checked before it is used.
    unsafe {
        let fd = open64(path, 0);
        let bytes = lseek64(fd, 0, 2);
        let map = mmap64(null_mut(), bytes.max(1) as usize, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
        if map as isize == -1 {
            return false;
        }
        MAP_BYTES.store(bytes.max(0) as u64, Ordering::Relaxed);
        MAP.store(map.cast(), Ordering::Release);
    }
    true
}

/// Maps the ranges that are the vCPU thread's alone, if the node has any.
fn map_holds() {
    // SAFETY: names are terminated; the mapping is checked before it is used.
    unsafe {
        let path = getenv(c"HEDDLE_TAP_HOLDS".as_ptr());
        if path.is_null() {
            return;
        }
        let fd = open64(path, 0);
        let bytes = lseek64(fd, 0, 2);
        let map = mmap64(null_mut(), bytes.max(1) as usize, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
        if map as isize != -1 {
            HOLDS.store(map.cast(), Ordering::Relaxed);
            HOLD_COUNT.store(bytes.max(0) as u64 / 16, Ordering::Release);
        }
    }
}

/// Sleeps while the log's place is in a range that is the vCPU thread's alone.
fn hold() {
    let count = HOLD_COUNT.load(Ordering::Acquire);
    let mut next = HOLD_NEXT.load(Ordering::Relaxed);
    loop {
        let at = AT.load(Ordering::SeqCst);
        if at >= MAP_BYTES.load(Ordering::Relaxed) || at == STILL_AT.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: `next` is below the number of mapped pairs.
        let range = |next: u64| unsafe {
            let pair = HOLDS.load(Ordering::Relaxed).add(next as usize * 2);
            (*pair, *pair.add(1) & !STRICT, *pair.add(1) & STRICT != 0)
        };
        while next < count && range(next).1 < at {
            next += 1;
        }
        HOLD_NEXT.store(next, Ordering::Relaxed);
        if next >= count || at <= range(next).0 {
            return;
        }
        SLEEPER.store(1, Ordering::SeqCst);
        WAKE_AT.store(range(next).1, Ordering::SeqCst);
        if AT.load(Ordering::SeqCst) <= range(next).1 {
            let time = if range(next).2 { &raw const STRICT_HOLD } else { &raw const HOLD };
            // SAFETY: the futex word and the time live as long as the call.
            unsafe { syscall(SYS_FUTEX, SLEEPER.as_ptr(), FUTEX_WAIT_PRIVATE, 1, time) };
        }
        WAKE_AT.store(u64::MAX, Ordering::SeqCst);
        if AT.load(Ordering::SeqCst) == at {
            STILL_AT.store(at, Ordering::Relaxed);
            return;
        }
    }
}

/// The main loop's next nap.
fn next_nap() -> Timespec {
    let at = AT.load(Ordering::Relaxed);
    let has_moved = NAPPED_AT.swap(at, Ordering::Relaxed) != at;
    let last = NAP.load(Ordering::Relaxed);
    let nap = if has_moved { NAP_MIN_NANOSECONDS } else { (last * 2).min(NAP_MAX_NANOSECONDS) };
    NAP.store(nap, Ordering::Relaxed);
    Timespec { seconds: 0, nanoseconds: nap }
}

/// The main loop's poll. It holds no lock here, but where it waits inside of something
/// else: then a hold ends with its time. A replay need not wait out the time that
/// passed while it was recorded: all clocks are read from the log, so the main loop only
/// looks again soon.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ppoll(
    fds: *mut c_void,
    count: std::ffi::c_ulong,
    time: *const c_void,
    signals: *const c_void,
) -> c_int {
    if HOLD_COUNT.load(Ordering::Relaxed) > 0 && thread() == IOTHREAD {
        hold();
    }
    let nap;
    let mut time = time;
    if !MAP.load(Ordering::Relaxed).is_null() && thread() == IOTHREAD {
        nap = next_nap();
        // SAFETY: the caller's time is null or a whole one.
        let wanted = unsafe { time.cast::<Timespec>().as_ref() };
        if wanted.is_none_or(|wanted| wanted.seconds > 0 || wanted.nanoseconds > nap.nanoseconds) {
            time = (&raw const nap).cast();
        }
    }
    next!(
        c"ppoll",
        fn(*mut c_void, std::ffi::c_ulong, *const c_void, *const c_void) -> c_int,
        fds, count, time, signals
    )
}

/// The monitor's thread polls by this.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poll(fds: *mut c_void, count: std::ffi::c_ulong, time: c_int) -> c_int {
    if HOLD_COUNT.load(Ordering::Relaxed) > 0 && thread() == MONITOR {
        let at = AT.load(Ordering::Relaxed);
        // Where the log stands still, what wakes it is a question.
        if POLLED_AT.swap(at, Ordering::Relaxed) != at {
            // SAFETY: no memory is involved.
            unsafe { usleep(MONITOR_NAP_MICROSECONDS) };
        }
    }
    next!(c"poll", fn(*mut c_void, std::ffi::c_ulong, c_int) -> c_int, fds, count, time)
}

/// Opens a file; the log is opened as a real stream whose bytes go another way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut File {
    let is_log = is_log_path(path);
    // A recording's bytes go to the ring alone.
    let opened = if is_log && is_recording() { c"/dev/null".as_ptr() } else { path };
    let stream = next!(c"fopen64", fn(*const c_char, *const c_char) -> *mut File, opened, mode);
    if !is_log || stream.is_null() {
        return stream;
    }
    if !is_recording() && !map_log(path) {
        return null_mut();
    }
    map_holds();
    LOG.store(stream, Ordering::Release);
    // Children of QEMU's are none of ours.
    for name in [c"LD_PRELOAD", c"HEDDLE_TAP_LOG", c"HEDDLE_TAP_RING", c"HEDDLE_TAP_HOLDS"] {
        // SAFETY: the name is terminated.
        unsafe { unsetenv(name.as_ptr()) };
    }
    if let Some(stage) = word(12) {
        stage.store(STAGE_OPEN, Ordering::Release);
    }
    stream
}

/// Writes one byte at the stream's place.
fn write(byte: u8) {
    let (Some(ring_bytes), Some(written), Some(taken)) = (field(24), field(64), field(128)) else { return };
    let at = AT.load(Ordering::Relaxed);
    AT.store(at + 1, Ordering::Relaxed);
    if at < END.load(Ordering::Relaxed) {
        // The version, written over the header at the end: the node supplies its own.
        return;
    }
    let room = ring_bytes.load(Ordering::Relaxed);
    while at - taken.load(Ordering::Acquire) >= room {
        // The node takes nothing: the guest waits, as nothing may be lost.
        // SAFETY: no memory is involved.
        unsafe { usleep(200) };
    }
    mark(at);
    // SAFETY: the place is within the ring, which is mapped for the process's life.
    unsafe { *RING.load(Ordering::Relaxed).add(PAGE + (at % room) as usize) = byte };
    END.store(at + 1, Ordering::Relaxed);
    written.store(at + 1, Ordering::Release);
}

/// Reads one byte from the stream's place.
fn read() -> c_int {
    let at = AT.load(Ordering::Relaxed);
    if at >= MAP_BYTES.load(Ordering::Relaxed) {
        IS_AT_EOF.store(1, Ordering::Relaxed);
        return EOF;
    }
    mark(at);
    // SAFETY: the offset is below the mapping's length.
    let byte = unsafe { *MAP.load(Ordering::Relaxed).add(at as usize) };
    AT.store(at + 1, Ordering::SeqCst);
    if let Some(read) = field(64) {
        read.store(at + 1, Ordering::Release);
    }
    if at + 1 > WAKE_AT.load(Ordering::SeqCst) {
        WAKE_AT.store(u64::MAX, Ordering::SeqCst);
        SLEEPER.store(0, Ordering::SeqCst);
        // SAFETY: the futex word lives as long as the process.
        unsafe { syscall(SYS_FUTEX, SLEEPER.as_ptr(), FUTEX_WAKE_PRIVATE, 1) };
    }
    c_int::from(byte)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn putc(byte: c_int, file: *mut File) -> c_int {
    if !is_log(file) {
        return next!(c"putc", fn(c_int, *mut File) -> c_int, byte, file);
    }
    write(byte as u8);
    c_int::from(byte as u8)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fwrite(data: *const c_void, size: usize, count: usize, file: *mut File) -> usize {
    if !is_log(file) {
        return next!(
            c"fwrite",
            fn(*const c_void, usize, usize, *mut File) -> usize,
            data, size, count, file
        );
    }
    for at in 0..size.saturating_mul(count) {
        // SAFETY: the caller gives `size * count` bytes.
        write(unsafe { *data.cast::<u8>().add(at) });
    }
    count
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn getc(file: *mut File) -> c_int {
    if !is_log(file) {
        return next!(c"getc", fn(*mut File) -> c_int, file);
    }
    read()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fread(data: *mut c_void, size: usize, count: usize, file: *mut File) -> usize {
    if !is_log(file) {
        return next!(
            c"fread",
            fn(*mut c_void, usize, usize, *mut File) -> usize,
            data, size, count, file
        );
    }
    for at in 0..size.saturating_mul(count) {
        match read() {
            EOF => return at / size.max(1),
            // SAFETY: the caller gives room for `size * count` bytes.
            byte => unsafe { *data.cast::<u8>().add(at) = byte as u8 },
        }
    }
    count
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fseek(file: *mut File, offset: c_long, whence: c_int) -> c_int {
    if !is_log(file) {
        return next!(c"fseek", fn(*mut File, c_long, c_int) -> c_int, file, offset, whence);
    }
    let base = match whence {
        0 => 0,
        1 => AT.load(Ordering::Relaxed),
        _ if is_recording() => END.load(Ordering::Relaxed),
        _ => MAP_BYTES.load(Ordering::Relaxed),
    };
    let at = base.saturating_add_signed(offset as i64);
    AT.store(at, Ordering::Relaxed);
    IS_AT_EOF.store(0, Ordering::Relaxed);
    // Behind a seek the next byte is marked anew: what was read ahead counts no more.
    MARKED_NEXT.store(u64::MAX, Ordering::Relaxed);
    if is_recording() && END.load(Ordering::Relaxed) == 0 {
        // The header's place, left open at the start.
        END.store(at, Ordering::Relaxed);
        if let (Some(written), Some(taken)) = (field(64), field(128)) {
            taken.store(at, Ordering::Relaxed);
            written.store(at, Ordering::Release);
        }
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftell(file: *mut File) -> c_long {
    if !is_log(file) {
        return next!(c"ftell", fn(*mut File) -> c_long, file);
    }
    AT.load(Ordering::Relaxed) as c_long
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn feof(file: *mut File) -> c_int {
    if !is_log(file) {
        return next!(c"feof", fn(*mut File) -> c_int, file);
    }
    IS_AT_EOF.load(Ordering::Relaxed) as c_int
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ferror(file: *mut File) -> c_int {
    if !is_log(file) {
        return next!(c"ferror", fn(*mut File) -> c_int, file);
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fclose(file: *mut File) -> c_int {
    if is_log(file) {
        LOG.store(null_mut(), Ordering::Release);
        if let Some(stage) = word(12) {
            stage.store(STAGE_CLOSED, Ordering::Release);
        }
    }
    next!(c"fclose", fn(*mut File) -> c_int, file)
}
