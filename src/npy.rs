//! `.npy` files, as NumPy writes them: vectors to import and to measure with.
//!
//! Formats 1 to 3: magic, version, length of the header (u16, from version 2 on u32), a Python dict as text, then the
//! values in C order. Only two dimensions are read.

use anyhow::{Context, bail, ensure};
use half::f16;
use std::io::Read;

/// First bytes of a file.
pub const MAGIC: &[u8] = b"\x93NUMPY";
/// Longer headers are not ours to read: it is a dict of three entries.
const HEADER_BYTES_MAX: usize = 1 << 16;

/// What a file says of its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The type, such as `<f4`.
    pub descr: String,
    /// Rows.
    pub rows: usize,
    /// Values in a row.
    pub width: usize,
    /// Bytes of a value.
    pub item_bytes: usize,
}

impl Header {
    /// Reads magic and header; the values come next.
    pub fn read(file: &mut impl Read) -> anyhow::Result<Self> {
        let mut magic = [0; 8];
        file.read_exact(&mut magic).context("cut short")?;
        ensure!(magic.starts_with(MAGIC) && (1..=3).contains(&magic[6]), "not a .npy file of format 1 to 3");
        let mut length = [0; 4];
        file.read_exact(&mut length[..if magic[6] == 1 { 2 } else { 4 }]).context("cut short")?;
        let length = usize::try_from(u32::from_le_bytes(length))?;
        ensure!(length <= HEADER_BYTES_MAX, "a header of {length} bytes");
        let mut header = vec![0; length];
        file.read_exact(&mut header).context("cut short")?;
        let header = std::str::from_utf8(&header)?;
        let after = |name: &str| {
            header.split_once(name).map(|(_, rest)| rest).with_context(|| format!("no {name} in {header}"))
        };
        ensure!(after("'fortran_order':")?.trim_start().starts_with("False"), "only C order is read");
        let descr = after("'descr':")?.split('\'').nth(1).context("descr is not a text")?.to_owned();
        let shape = after("'shape':")?.split(['(', ')']).nth(1).context("shape is not a tuple")?;
        let shape: Vec<usize> =
            shape.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::parse).collect::<Result<_, _>>()?;
        let &[rows, width] = shape.as_slice() else { bail!("the shape is {shape:?}, not two numbers") };
        let item_bytes = descr.get(2..).and_then(|n| n.parse::<usize>().ok()).context("descr has no size")?;
        Ok(Self { descr, rows, width, item_bytes })
    }

    /// Bytes of all values; `None` when no memory could hold them.
    #[must_use]
    pub fn value_bytes(&self) -> Option<usize> {
        self.rows.checked_mul(self.width)?.checked_mul(self.item_bytes)
    }

    /// Values as f32.
    pub fn floats(&self, values: &[u8]) -> anyhow::Result<Vec<f32>> {
        Ok(match self.descr.as_str() {
            "|u1" => values.iter().map(|&v| f32::from(v)).collect(),
            "<f2" => values.as_chunks().0.iter().map(|&v| f16::from_le_bytes(v).to_f32()).collect(),
            "<f4" => values.as_chunks().0.iter().map(|&v| f32::from_le_bytes(v)).collect(),
            other => bail!("vectors of {other:?} are not read; u8, f16 and f32 are"),
        })
    }
}
