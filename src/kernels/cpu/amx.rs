//! Products of rows of bf16 values with panels of bf16 values on AMX, the matrix unit of Intel's server processors.
//!
//! A tile is up to 16 rows of 64 bytes: 32 inputs of rows of `x`, or 16 lines of a panel, or 16 outputs of rows. Every output
//! goes through the same instructions, inputs ascending, whichever rows and panels are beside it, so its bits depend on
//! nothing but its row. The unit takes denormal values for zeros, of which there are none.
//!
//! Rust's intrinsics for AMX are unstable, so this is assembly. The compiler itself never uses tiles.

use super::{
    inputs::round,
    isa::Level,
    line::{BLOCK, Bf16, LANES},
    scratch::{halves, local, values},
    target::{Bands, Place},
};
use std::{
    arch::{asm, x86_64},
    ops::Range,
    sync::OnceLock,
};

/// Leave to use AMX: the processor has it, and the system lets this process use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Amx(());

impl Amx {
    pub(super) fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(|| is_there() && is_allowed()).then_some(Self(()))
    }

    /// How rows are cut: up to 256 of 2048 inputs stay in the second-level cache (1 MB of 2) while panels pass by.
    pub(super) fn bands(self) -> Bands {
        Bands { most: 256, least: 128, step: 2 * ROWS, panels: 2, group: 8 }
    }

    /// Computes the outputs of `block`. Tiles are loaded and stored by cache lines, so rows of `x` and of outputs should begin at them.
    ///
    /// # Safety
    /// No other thread accesses these outputs of these rows meanwhile.
    pub(super) unsafe fn product(self, block: &Block<'_>) {
        let Block { rows, panels, .. } = block;
        if rows.is_empty() || panels.is_empty() || block.depth < BLOCK {
            return;
        }
        let _tiles = Tiles::new(self, rows.len().min(ROWS));
        // The last tile begins early enough to be full, and keeps only the rows that no other has.
        let last = rows.end.saturating_sub(ROWS).max(rows.start);
        let tile = |row: usize| Tile { rows: row.min(last)..rows.end.min(row.min(last) + ROWS), kept: row };
        let chunk = block.depth.div_ceil(block.depth.div_ceil(DEPTH)).next_multiple_of(BLOCK);
        for inputs in (0..block.depth).step_by(chunk).map(|from| from..block.depth.min(from + chunk)) {
            for panel in panels.clone().step_by(2) {
                let pair = [panel, (panel + 1).min(panels.end - 1)];
                for (i, row) in rows.clone().step_by(2 * ROWS).enumerate() {
                    let (this, next) = (tile(row), tile(row + ROWS));
                    // SAFETY: the tiles are configured for as many rows as `tile` gives; the rest is as of this function.
                    unsafe {
                        if next.kept >= rows.end {
                            two(block, &this, pair, &inputs);
                        } else if !four(block, [&this, &next], panel, &inputs, i) {
                            two(block, &this, pair, &inputs);
                            two(block, &next, pair, &inputs);
                        }
                    }
                }
            }
        }
    }

    /// The products of rows, `shape` being their number and inputs, with all panels of `place`.
    ///
    /// # Safety
    /// No other thread accesses these outputs meanwhile.
    pub(super) unsafe fn alone<'a>(
        self,
        level: Level,
        (rows, inputs): (usize, usize),
        x: impl Fn(usize) -> &'a [f32],
        lines: &[Bf16],
        place: &Place<'_>,
    ) {
        let depth = inputs.next_multiple_of(BLOCK);
        local((rows * depth).div_ceil(2 * LANES), |own| {
            let own = &mut halves(values(own))[..rows * depth];
            own.chunks_exact_mut(depth).enumerate().for_each(|(i, to)| round(level, x(i), to));
            // SAFETY: as of this function.
            unsafe { self.product(&Block { x: own, lines, depth, place, rows: 0..rows, panels: 0..place.panels() }) };
        });
    }
}

/// Rows that are computed together.
struct Tile {
    rows: Range<usize>,
    /// The first of those that are written.
    kept: usize,
}

impl Tile {
    /// Where a whole panel of these rows begins, if all of it is written.
    fn corner(&self, place: &Place<'_>, panel: usize) -> Option<*mut f32> {
        place.corner(self.rows.clone(), panel).filter(|_| self.kept == self.rows.start)
    }
}

/// Outputs to be computed: those of `panels` for `rows`.
pub(super) struct Block<'a> {
    /// All rows, bits of bf16, `(rows, depth)`.
    pub x: &'a [u16],
    /// Inputs, whole blocks.
    pub depth: usize,
    /// All panels.
    pub lines: &'a [Bf16],
    pub place: &'a Place<'a>,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
}

/// Rows of a tile.
const ROWS: usize = 16;

/// Inputs at a time, so that those of two panels (40 kB) stay in the first-level cache while rows pass by.
const DEPTH: usize = 640;

/// Bytes from a line to the next.
const LINE: usize = size_of::<Bf16>();

/// Bytes that are asked for ahead of a tile of weights, which is 1024 of them.
const AHEAD: usize = 1024;

/// Adds the products of `inputs`, or begins with them, to the outputs of two panels, which may be one and the same, for a tile's rows.
///
/// # Safety
/// Tiles are configured for as many rows, and no other thread accesses these outputs meanwhile.
unsafe fn two(block: &Block<'_>, tile: &Tile, panels: [usize; 2], inputs: &Range<usize>) {
    let Tile { ref rows, kept } = *tile;
    let x = &block.x[rows.start * block.depth..rows.end * block.depth][inputs.start..];
    let weights = panels.map(|panel| weights(block, panel, inputs));
    let mut sums = [[[0.0; LANES]; ROWS]; 2];
    let corners = panels.map(|panel| tile.corner(block.place, panel));
    if let (true, [None, _] | [_, None]) = (inputs.start > 0, corners) {
        for (panel, sums) in panels.into_iter().zip(&mut sums) {
            for (row, sums) in rows.clone().zip(sums) {
                // SAFETY: as of this function.
                let y = unsafe { block.place.outputs(row, panel, 1) };
                sums[..y.len()].copy_from_slice(y);
            }
        }
    }
    let (y, width, is_direct) = match corners {
        [Some(first), Some(second)] => ([first, second], block.place.stride(), true),
        _ => (sums.each_mut().map(|sums| sums.as_mut_ptr().cast()), LANES, false),
    };
    macro_rules! products {
        ($($begin:literal),+) => {
            // SAFETY: AMX is there, as tiles are configured. The tiles of `x` step by 32 inputs through `inputs` in each of `rows`, those of
            // weights by 16 lines; each `y` has 16 values in each of `rows`, `width` apart.
            unsafe {
                asm!(
            $($begin,)+
            "2:",
            "prefetcht0 [{w0} + {ahead} + 0]",
            "prefetcht0 [{w0} + {ahead} + 64]",
            "prefetcht0 [{w0} + {ahead} + 128]",
            "prefetcht0 [{w0} + {ahead} + 192]",
            "prefetcht0 [{w0} + {ahead} + 256]",
            "prefetcht0 [{w0} + {ahead} + 320]",
            "prefetcht0 [{w0} + {ahead} + 384]",
            "prefetcht0 [{w0} + {ahead} + 448]",
            "prefetcht0 [{w0} + {ahead} + 512]",
            "prefetcht0 [{w0} + {ahead} + 576]",
            "prefetcht0 [{w0} + {ahead} + 640]",
            "prefetcht0 [{w0} + {ahead} + 704]",
            "prefetcht0 [{w0} + {ahead} + 768]",
            "prefetcht0 [{w0} + {ahead} + 832]",
            "prefetcht0 [{w0} + {ahead} + 896]",
            "prefetcht0 [{w0} + {ahead} + 960]",
            "prefetcht0 [{w1} + {ahead} + 0]",
            "prefetcht0 [{w1} + {ahead} + 64]",
            "prefetcht0 [{w1} + {ahead} + 128]",
            "prefetcht0 [{w1} + {ahead} + 192]",
            "prefetcht0 [{w1} + {ahead} + 256]",
            "prefetcht0 [{w1} + {ahead} + 320]",
            "prefetcht0 [{w1} + {ahead} + 384]",
            "prefetcht0 [{w1} + {ahead} + 448]",
            "prefetcht0 [{w1} + {ahead} + 512]",
            "prefetcht0 [{w1} + {ahead} + 576]",
            "prefetcht0 [{w1} + {ahead} + 640]",
            "prefetcht0 [{w1} + {ahead} + 704]",
            "prefetcht0 [{w1} + {ahead} + 768]",
            "prefetcht0 [{w1} + {ahead} + 832]",
            "prefetcht0 [{w1} + {ahead} + 896]",
            "prefetcht0 [{w1} + {ahead} + 960]",
            "tileloadd tmm4, [{x} + {row}*1]",
            "tileloadd tmm6, [{w0} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {x}, 64",
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{y0} + {width}*1], tmm0",
            "tilestored [{y1} + {width}*1], tmm1",
            x = inout(reg) x.as_ptr() => _,
            w0 = inout(reg) weights[0].as_ptr() => _,
            w1 = inout(reg) weights[1].as_ptr() => _,
            steps = inout(reg) inputs.len() / BLOCK => _,
            row = in(reg) block.depth * size_of::<u16>(),
            line = in(reg) LINE,
            y0 = in(reg) y[0],
            y1 = in(reg) y[1],
            width = in(reg) width * size_of::<f32>(),
            ahead = const AHEAD,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
                );
            }
        };
    }
    match inputs.start {
        0 => products!("tilezero tmm0", "tilezero tmm1"),
        _ => products!("tileloadd tmm0, [{y0} + {width}*1]", "tileloadd tmm1, [{y1} + {width}*1]"),
    }
    if is_direct {
        return;
    }
    for (panel, sums) in panels.into_iter().zip(&sums) {
        for (row, sums) in rows.clone().zip(sums).skip(kept - rows.start) {
            // SAFETY: as of this function.
            let y = unsafe { block.place.outputs(row, panel, 1) };
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = *sum);
        }
    }
}

/// As [`two`], for two whole panels, one after the other, and the rows of two tiles, the `i`th of a band; whether they are whole.
///
/// # Safety
/// As of [`two`].
unsafe fn four(block: &Block<'_>, tiles: [&Tile; 2], panel: usize, inputs: &Range<usize>, i: usize) -> bool {
    if panel + 1 >= block.panels.end || tiles[1].corner(block.place, panel + 1).is_none() {
        return false;
    }
    let [Some(y0), Some(y1)] = tiles.map(|tile| tile.corner(block.place, panel)) else { return false };
    let x = tiles.map(|Tile { rows, .. }| &block.x[rows.start * block.depth..rows.end * block.depth][inputs.start..]);
    let weights = [weights(block, panel, inputs), weights(block, panel + 1, inputs)];
    let stride = block.place.stride();
    // An eighth of the next two panels is asked for meanwhile, which are all of them in a band of 256 rows. And so is what is
    // to be written, again and again, as there may be more steps than rows.
    let end = y0.wrapping_add(2 * ROWS * stride);
    let next = weights[i / 4 % 2].as_ptr().wrapping_add(block.depth + i % 4 * inputs.len() / 8);
    macro_rules! products {
        ($($begin:literal),+) => {
            // SAFETY: as in `two`, twice; `y0` and `y1` are followed by the second panel's 16 values, as it is whole.
            unsafe {
                asm!(
            $($begin,)+
            "2:",
            "tileloadd tmm4, [{x0} + {row}*1]",
            "tileloadd tmm6, [{w0} + {line}*1]",
            "prefetcht1 [{next}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}*1]",
            "prefetcht1 [{next} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + {row}*1]",
            "prefetcht1 [{next} + 128]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "prefetcht1 [{next} + 192]",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "prefetchw [{own}]",
            "prefetchw [{own} + 64]",
            "prefetchw [{own} + {width}*1]",
            "prefetchw [{own} + {width}*1 + 64]",
            "lea {own}, [{own} + {width}*2]",
            "cmp {own}, {end}",
            "cmovae {own}, {y0}",
            "add {next}, 256",
            "add {x0}, 64",
            "add {x1}, 64",
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{y0} + {width}*1], tmm0",
            "tilestored [{y0} + {width}*1 + 64], tmm1",
            "tilestored [{y1} + {width}*1], tmm2",
            "tilestored [{y1} + {width}*1 + 64], tmm3",
            own = inout(reg) y0 => _,
            end = in(reg) end,
            next = inout(reg) next => _,
            x0 = inout(reg) x[0].as_ptr() => _,
            x1 = inout(reg) x[1].as_ptr() => _,
            w0 = inout(reg) weights[0].as_ptr() => _,
            w1 = inout(reg) weights[1].as_ptr() => _,
            steps = inout(reg) inputs.len() / BLOCK => _,
            row = in(reg) block.depth * size_of::<u16>(),
            line = in(reg) LINE,
            y0 = in(reg) y0,
            y1 = in(reg) y1,
            width = in(reg) stride * size_of::<f32>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
                );
            }
        };
    }
    match inputs.start {
        0 => products!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"),
        _ => products!(
            "tileloadd tmm0, [{y0} + {width}*1]",
            "tileloadd tmm1, [{y0} + {width}*1 + 64]",
            "tileloadd tmm2, [{y1} + {width}*1]",
            "tileloadd tmm3, [{y1} + {width}*1 + 64]"
        ),
    }
    true
}

/// The lines of some inputs of a panel.
fn weights<'a>(block: &Block<'a>, panel: usize, inputs: &Range<usize>) -> &'a [Bf16] {
    let first = panel * block.depth / 2;
    &block.lines[first + inputs.start / 2..first + inputs.end / 2]
}

/// The tiles of this thread, configured until it is dropped.
pub(super) struct Tiles(());

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    /// Bytes of a row.
    width: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// Tiles 0 to 3 are sums and 4 and 5 inputs, of `rows` rows (up to 16); 6 and 7 are weights.
    pub(super) fn new(_: Amx, rows: usize) -> Self {
        let mut shape = Shape { palette: 1, start: 0, reserved: [0; 14], width: [0; 16], rows: [0; 16] };
        shape.width[..8].fill(64);
        shape.rows[..6].fill(rows.clamp(1, ROWS) as u8);
        shape.rows[6..8].fill(ROWS as u8);
        // SAFETY: AMX is there, as `Amx` is; it reads the 64 bytes of `Shape`, which describe tiles that it has.
        unsafe { asm!("ldtilecfg [{shape}]", shape = in(reg) &shape, options(nostack, preserves_flags, readonly)) };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: AMX is there, as `Tiles` is. Threads without tiles are cheaper to switch between.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// Whether the processor has tiles and their bf16 products, and the system keeps tiles with a thread's other registers.
fn is_there() -> bool {
    // `amx-bf16`, `amx-tile`
    const UNITS: u32 = 1 << 22 | 1 << 24;
    const TILES: u64 = 1 << 17 | 1 << 18;
    // SAFETY: all x86-64 processors have `cpuid`; a leaf that one has not is asked for only below the number of leaves.
    #[allow(unused_unsafe)]
    let units = unsafe { x86_64::__cpuid(0).eax >= 7 && x86_64::__cpuid_count(7, 0).edx & UNITS == UNITS };
    // SAFETY: XSAVE, which has `xgetbv`, is there.
    units && is_x86_feature_detected!("xsave") && unsafe { saved() } & TILES == TILES
}

/// The sets of registers that the system saves.
#[target_feature(enable = "xsave")]
fn saved() -> u64 {
    // SAFETY: register 0 is there with XSAVE.
    #[allow(unused_unsafe)]
    unsafe {
        x86_64::_xgetbv(0)
    }
}

/// Asks Linux for leave to use tiles, which every process has to.
#[cfg(target_os = "linux")]
fn is_allowed() -> bool {
    // <https://docs.kernel.org/arch/x86/xstate.html>
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a call of two numbers, which changes nothing but what this process may use; it fails where it is unknown.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_allowed() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::{
        super::{noise, threads::Shares},
        *,
    };
    use half::bf16;

    #[test]
    fn nothing_but_a_block_is_written() {
        let Some(amx) = Amx::detect() else {
            println!("skipped: this processor has no amx");
            return;
        };
        // Inputs are taken in three parts.
        let (count, depth) = (70, 1_664);
        let x: Vec<u16> = noise(count * depth, 1).into_iter().map(|x| bf16::from_f32(x).to_bits()).collect();
        let one = bf16::from_f32(1.0).to_bits();
        for width in [16usize, 31, 40, 64, 97] {
            let lines = vec![Bf16([one; 2 * LANES]); width.div_ceil(LANES) * depth / 2];
            let last = width.div_ceil(LANES);
            for rows in [0..1, 3..7, 1..17, 5..21, 2..34, 20..53, 40..70] {
                for panels in [0..last, 0..1, last - 1..last, last / 2..last] {
                    let mut y = vec![-700.0; count * width];
                    let (shares, rows_of, panels_of) = (Shares::new(&mut y), rows.clone(), panels.clone());
                    let place = &Place::of(&shares, width, width);
                    // SAFETY: there is one thread.
                    unsafe { amx.product(&Block { x: &x, depth, lines: &lines, place, rows: rows_of, panels: panels_of }) };
                    for (i, y) in y.into_iter().enumerate() {
                        let inside = rows.contains(&(i / width)) && panels.contains(&(i % width / LANES));
                        assert_eq!(inside, y != -700.0, "{width} outputs: rows {rows:?}, panels {panels:?}: {y} at {i}");
                    }
                }
            }
        }
    }
}
