/* The bundled guest: does what makes replay hard, and prints what came of it.
 *
 * Timer interrupts, WFI (so that the clock warps), RTC reads, disk reads and
 * writes whose completions race timers, console input, translations that the
 * TLB has and the page table has no more, and how often another thread had to
 * kick this hart out of its run. Every line printed depends on all of it. */

typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define REG32(a) (*(volatile u32 *)(a))
#define REG64(a) (*(volatile u64 *)(a))
#define UART 0x10000000UL
#define RTC 0x101000UL
#define TEST 0x100000UL
#define MTIMECMP 0x2004000UL
#define MTIME 0x200bff8UL
#define PLIC 0xc000000UL
#define DISK 0x10001000UL
#define csr_read(c) ({ u64 v_; asm volatile("csrr %0, " #c : "=r"(v_)); v_; })
#define csr_write(c, v) asm volatile("csrw " #c ", %0" ::"r"((u64)(v)))
#define csr_set(c, v) asm volatile("csrs " #c ", %0" ::"r"((u64)(v)))
#define csr_clear(c, v) asm volatile("csrc " #c ", %0" ::"r"((u64)(v)))
#define fence() asm volatile("fence" ::: "memory")

#define ROUNDS 24
#define PASSES 62
#define WORDS 8192
#define TAG_TIMER 1
#define TAG_DISK 2
#define TAG_INPUT 3

static volatile u64 timer_fired, timer_late, disk_done, disk_at, input_seen;
static volatile u64 order; /* which came first, round after round */
static u64 sum = 0x6865646c65UL;
static u64 words[WORDS];
static volatile char line[64];
static volatile u32 line_len;

static void mix(u64 v) {
    sum ^= v + 0x9e3779b97f4a7c15UL + (sum << 6) + (sum >> 2);
    sum *= 0xff51afd7ed558ccdUL;
}

/* ---- console ---- */
static void put(char c) { *(volatile u8 *)UART = c; }
static void puts_(const char *s) { while (*s) put(*s++); }
static void hex(u64 v, int digits) {
    while (digits--) put("0123456789abcdef"[v >> (digits * 4) & 15]);
}
static void dec(u64 v) {
    char b[20]; int n = 0;
    do { b[n++] = '0' + v % 10; v /= 10; } while (v);
    while (n) put(b[--n]);
}

/* ---- disk: virtio-mmio, version 2, one queue of 8 ---- */
static struct { u64 addr; u32 len; u16 flags, next; } desc[8] __attribute__((aligned(4096)));
static struct { u16 flags, idx, ring[8]; } avail __attribute__((aligned(4096)));
static volatile struct { u16 flags, idx; struct { u32 id, len; } ring[8]; } used __attribute__((aligned(4096)));
static struct { u32 type, reserved; u64 sector; } header;
static volatile u8 status;
static u8 sector_bytes[4096] __attribute__((aligned(4096)));
static u16 used_seen;

static void disk_init(void) {
    if (REG32(DISK + 8) != 2) { puts_("no disk\n"); return; }
    REG32(DISK + 0x70) = 0;
    REG32(DISK + 0x70) = 3;
    REG32(DISK + 0x24) = 1;
    REG32(DISK + 0x20) = 1; /* VIRTIO_F_VERSION_1 */
    REG32(DISK + 0x70) = 11;
    REG32(DISK + 0x30) = 0;
    REG32(DISK + 0x38) = 8;
    REG32(DISK + 0x80) = (u64)desc;
    REG32(DISK + 0x84) = (u64)desc >> 32;
    REG32(DISK + 0x90) = (u64)&avail;
    REG32(DISK + 0x94) = (u64)&avail >> 32;
    REG32(DISK + 0xa0) = (u64)&used;
    REG32(DISK + 0xa4) = (u64)&used >> 32;
    REG32(DISK + 0x44) = 1;
    REG32(DISK + 0x70) = 15;
}

static void disk_start(u32 type, u64 sector, u32 sectors) {
    header.type = type;
    header.sector = sector;
    status = 0xff;
    desc[0].addr = (u64)&header; desc[0].len = 16; desc[0].flags = 1; desc[0].next = 1;
    desc[1].addr = (u64)sector_bytes; desc[1].len = sectors * 512;
    desc[1].flags = type ? 1 : 3; desc[1].next = 2;
    desc[2].addr = (u64)&status; desc[2].len = 1; desc[2].flags = 2;
    avail.ring[avail.idx % 8] = 0;
    fence();
    avail.idx++;
    fence();
    disk_done = 0;
    REG32(DISK + 0x50) = 0;
}

/* ---- interrupts ---- */
u64 trap(u64 cause, u64 epc) {
    if (cause == (1UL << 63 | 7)) {
        u64 now = REG64(MTIME);
        timer_late = now - REG64(MTIMECMP);
        timer_fired = 1;
        order = order * 5 + TAG_TIMER;
        REG64(MTIMECMP) = ~0UL;
        return epc;
    }
    if (cause == (1UL << 63 | 11)) {
        u32 source = REG32(PLIC + 0x200004);
        if (source == 1) {
            REG32(DISK + 0x64) = REG32(DISK + 0x60);
            if (used.idx != used_seen) {
                used_seen = used.idx;
                disk_done = 1;
                disk_at = csr_read(mcycle);
                order = order * 5 + TAG_DISK;
            }
        } else if (source == 10) {
            while (*(volatile u8 *)(UART + 5) & 1) {
                char c = *(volatile u8 *)UART;
                if (line_len < sizeof line) line[line_len++] = c;
                input_seen++;
            }
            order = order * 5 + TAG_INPUT;
        }
        REG32(PLIC + 0x200004) = source;
        return epc;
    }
    puts_("unexpected trap "); hex(cause, 16); puts_(" at "); hex(epc, 16); put('\n');
    REG32(TEST) = 2 << 16 | 0x3333;
    return epc;
}

static void timer_in(u64 ticks) {
    timer_fired = 0;
    REG64(MTIMECMP) = REG64(MTIME) + ticks;
}

/* ---- a translation that outlives its page-table entry ---- */
static u64 root[512] __attribute__((aligned(4096)));
static u64 middle[512] __attribute__((aligned(4096)));
static u64 leaf[512] __attribute__((aligned(4096)));
static u64 pages[3][512] __attribute__((aligned(4096)));

static void paging_init(void) {
    u64 va = 0x40000000UL;
    csr_write(pmpaddr0, ~0UL); /* S-mode may access all */
    csr_write(pmpcfg0, 0x1f);
    root[va >> 30 & 511] = (u64)middle >> 12 << 10 | 1;
    middle[va >> 21 & 511] = (u64)leaf >> 12 << 10 | 1;
    csr_write(satp, 8UL << 60 | (u64)root >> 12);
    asm volatile("sfence.vma" ::: "memory");
}

/* Reads through the page table while in machine mode: MPRV with MPP = S. */
static u64 read_translated(u64 va) {
    u64 v;
    u64 bits = 1UL << 17 | 1UL << 11, old = csr_read(mstatus) & 0x1800;
    csr_clear(mstatus, 8);
    csr_clear(mstatus, 0x1800);
    csr_set(mstatus, bits);
    asm volatile("ld %0, 0(%1)" : "=r"(v) : "r"(va) : "memory");
    csr_clear(mstatus, 1UL << 17 | 0x1800);
    csr_set(mstatus, old | 8);
    return v;
}

static void map(u64 slot, u64 page) {
    leaf[slot] = (u64)pages[page] >> 12 << 10 | 0xcf;
    fence();
}

static void stale_round(u64 round) {
    u64 va = 0x40000000UL;
    for (u64 slot = 0; slot < 16; slot++) {
        pages[0][slot] = sum + slot;
        pages[1][slot] = ~sum + round;
        map(slot, (slot + round) & 1);
        u64 a = read_translated(va + slot * 4096 + slot * 8);
        map(slot, (slot + round + 1) & 1); /* no sfence: the old translation may stay */
        u64 b = read_translated(va + slot * 4096 + slot * 8);
        mix(a * 3 + b);
    }
    if (round % 5 == 4) asm volatile("sfence.vma" ::: "memory");
}

/* ---- work ---- */
static void compute(u64 passes) {
    for (u64 p = 0; p < passes; p++) {
        u64 a = sum, b = sum >> 7;
        for (u64 i = 0; i < WORDS; i++) {
            a = a * 6364136223846793005UL + 1442695040888963407UL;
            b ^= a >> 29;
            b = (b << 13 | b >> 51) + words[i];
            words[(i * 5 + 3) % WORDS] ^= b;
        }
        mix(a ^ b);
    }
}

/* Sum and bit tricks over bytes, as text and checksum code has them. */
static void bytes(u64 len) {
    u32 crc = ~0U;
    for (u64 i = 0; i < len; i++) {
        crc ^= sector_bytes[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (0xedb88320U & -(crc & 1));
    }
    mix(crc);
}

static u64 rtc_read(void) {
    u64 low = REG32(RTC);
    return low | (u64)REG32(RTC + 4) << 32;
}

/* `size`, the fourth register at entry, is zero after a boot. Tests that want a
 * short run put rounds << 8 | passes there. */
int main(u64 hart, u64 tree, u64 info, u64 size) {
    (void)hart, (void)tree, (void)info;
    u64 rounds = size ? size >> 8 : ROUNDS, passes = size ? size & 255 : PASSES;
    puts_("loom: a guest that is hard to replay\n");
    *(volatile u8 *)(UART + 2) = 1; /* FIFO on */
    *(volatile u8 *)(UART + 1) = 1; /* receive interrupt */
    REG32(PLIC + 4 * 1) = 1;
    REG32(PLIC + 4 * 10) = 1;
    REG32(PLIC + 0x2000) = 1 << 1 | 1 << 10;
    REG32(PLIC + 0x200000) = 0;
    for (u64 i = 0; i < (size ? 256 : WORDS); i++) words[i] = i * i;
    disk_init();
    paging_init();
    REG64(MTIMECMP) = ~0UL;
    csr_set(mie, 1 << 7 | 1 << 11);
    csr_set(mstatus, 8);

    for (u64 round = 0; round < rounds; round++) {
        compute(passes);

        /* A completion races a timer while the hart spins. */
        timer_in(40 + (sum & 255));
        disk_start(0, sum >> 9 & 1023, 1 + (sum & 7));
        u64 spins = 0;
        while (!disk_done || !timer_fired) { spins++; if (spins % 64 == 0) mix(spins); }
        mix(disk_at);
        mix(spins);
        bytes(size ? 64 : sizeof sector_bytes);

        /* And once more while it sleeps. */
        timer_in(3000 + (sum & 4095));
        disk_start(1, 1024 + round * 8, 8);
        u64 wakes = 0;
        while (!disk_done || !timer_fired) {
            csr_clear(mstatus, 8);
            if (!disk_done || !timer_fired) asm volatile("wfi");
            csr_set(mstatus, 8);
            wakes++;
        }
        mix(wakes);
        mix(timer_late);
        mix(status);

        mix(rtc_read());
        mix(csr_read(mhpmcounter3));
        mix(REG64(MTIME));
        mix(order);
        stale_round(round);

        u32 n = line_len;
        for (u32 i = 0; i < n; i++) mix(line[i]);
        puts_("round "); dec(round);
        puts_("  order "); hex(order & 0xffff, 4);
        puts_("  late "); dec(timer_late);
        puts_("  kicks "); dec(csr_read(mhpmcounter3));
        puts_("  typed "); dec(input_seen);
        puts_("  sum "); hex(sum, 16); put('\n');

        for (u64 i = 0; i < sizeof sector_bytes; i++) sector_bytes[i] = sum >> (i % 57);
    }
    puts_("typed: \"");
    for (u32 i = 0; i < line_len; i++) if (line[i] >= ' ') put(line[i]);
    puts_("\"\nfinal sum "); hex(sum, 16); put('\n');
    REG32(TEST) = 0x5555;
    return 0;
}
