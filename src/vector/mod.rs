//! Vectors: collections, their rows on disk, distance kernels, metadata filters, exact search and the graph.
//!
//! ```text
//! record ──apply──▶ Collection ── slots, id map, metadata           (memory)
//!                        │ ├────── RowStore: f32 rows by slot        (memory-mapped file)
//!                        │ ├────── MetaIndex: slots by metadata      (memory, filled in the background)
//!                        │ └────── Graph: rows in half-bytes, links   (memory, linked in the background)
//!                        └──checkpoint──▶ slots.log, graph.bin
//! query ──plan──▶ walk the graph, scan matches, or scan all ──▶ score again as sent ──▶ TopK ──▶ hits
//! ```
//!
//! Invariants
//! - A row is written once and never changes while a search may read it: an update takes a new slot, the old one is
//!   reused only when no link leads to it and no search is left that began before.
//! - A slot is visible to a search at revision R exactly when `born <= R < died`.
//! - Rows hold what was sent, bit for bit; cosine divides by the norm kept beside the row.
//! - Files here are ahead of or level with their checkpoint, never behind; what they lack, the log replays.
//!
//! Deliberately absent: tokio, the engine, HTTP, threads of its own, and locks but for the graph's links. Whoever owns a
//! collection decides how to share it.

mod chunks;
pub mod codes;
pub mod collection;
pub mod distance;
pub mod filter;
pub mod graph;
pub mod graph_file;
pub mod meta_index;
pub mod nodes;
pub mod plan;
pub mod storage;
pub mod topk;
pub mod validate;

use crate::error::Rejection;
use smol_str::SmolStr;
use std::borrow::Borrow;
use std::sync::{Arc, LazyLock};

/// Largest dimension of a collection. Current embedding models end at 4096.
pub const DIM_MAX: usize = 8192;
/// Longest vector id in bytes.
pub const ID_BYTES_MAX: usize = 512;
/// Largest metadata object in bytes of JSON; it is held in memory.
pub const META_BYTES_MAX: usize = 64 << 10;
/// Longest collection name in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Most hits one query may ask for.
pub const K_MAX: usize = 1000;
/// Deepest page of hits (`offset`); the scan keeps `offset + k` candidates.
pub const OFFSET_MAX: usize = 10_000;

/// A place in a collection's row file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl Slot {
    /// As an index into per-slot arrays.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A collection's name: `[A-Za-z0-9][A-Za-z0-9_.-]{0,63}`. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CollectionName(SmolStr);

impl CollectionName {
    /// Checks the form.
    pub fn new(text: &str) -> Result<Self, Rejection> {
        let mut bytes = text.bytes();
        let first_ok = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !first_ok || !bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) || text.len() > NAME_BYTES_MAX
        {
            return Err(Rejection::invalid("a collection name is [A-Za-z0-9][A-Za-z0-9_.-]{0,63}"));
        }
        Ok(Self(text.into()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for CollectionName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A vector's id: 1 to [`ID_BYTES_MAX`] bytes of UTF-8. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VectorId(SmolStr);

impl VectorId {
    /// Checks the length.
    pub fn new(text: &str) -> Result<Self, Rejection> {
        if text.is_empty() || text.len() > ID_BYTES_MAX {
            return Err(Rejection::invalid(format!("an id is 1 to {ID_BYTES_MAX} bytes")));
        }
        Ok(Self(text.into()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for VectorId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// How two vectors compare. Every score is "higher is better".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Cosine similarity, -1 to 1.
    Cosine,
    /// Inner product.
    Dot,
    /// Minus the Euclidean distance.
    L2,
}

impl Metric {
    /// The contract's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::Dot => "dot",
            Self::L2 => "l2",
        }
    }

    /// Reads the contract's word.
    pub fn parse(text: &str) -> Result<Self, Rejection> {
        match text {
            "cosine" => Ok(Self::Cosine),
            "dot" => Ok(Self::Dot),
            "l2" => Ok(Self::L2),
            _ => Err(Rejection::invalid("metric is one of cosine, dot, l2")),
        }
    }
}

/// What every vector of a collection shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CollectionSpec {
    /// Numbers in a vector, 1 to [`DIM_MAX`].
    pub dim: usize,
    /// How vectors compare.
    pub metric: Metric,
}

impl CollectionSpec {
    /// Checks the dimension.
    pub fn new(dim: usize, metric: Metric) -> Result<Self, Rejection> {
        if dim == 0 || dim > DIM_MAX {
            return Err(Rejection::invalid(format!("dim is 1 to {DIM_MAX}")));
        }
        Ok(Self { dim, metric })
    }
}

/// Finite numbers, at least one. Whether it fits a collection is checked by [`Vector::check`].
#[derive(Clone, Debug, PartialEq)]
pub struct Vector(Arc<[f32]>);

impl Vector {
    /// Checks that there are numbers and that all are finite.
    pub fn new(numbers: Vec<f32>) -> Result<Self, Rejection> {
        if numbers.is_empty() {
            return Err(Rejection::InvalidVector("the vector is empty".into()));
        }
        if let Some(at) = numbers.iter().position(|n| !n.is_finite()) {
            return Err(Rejection::InvalidVector(format!("number {at} of the vector is not a finite 32-bit float")));
        }
        Ok(Self(numbers.into()))
    }

    /// Checks that it fits a collection: the dimension, and a direction where the metric needs one.
    pub fn check(&self, spec: CollectionSpec) -> Result<(), Rejection> {
        if self.0.len() != spec.dim {
            return Err(Rejection::DimensionMismatch { expected: spec.dim, got: self.0.len() });
        }
        if spec.metric == Metric::Cosine && self.0.iter().all(|&n| n == 0.0) {
            return Err(Rejection::InvalidVector("a zero vector has no direction, so cosine cannot score it".into()));
        }
        Ok(())
    }

    /// The numbers.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }

    /// Asks the processor to fetch the numbers: worth it where another core wrote them.
    pub fn prefetch(&self) {
        distance::prefetch_numbers(&self.0);
    }
}

/// A vector's metadata: compact JSON text of an object. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorMeta(Arc<str>);

impl VectorMeta {
    /// No metadata.
    #[must_use]
    pub fn empty() -> Self {
        // One text for all: a million vectors without metadata share it.
        static EMPTY: LazyLock<Arc<str>> = LazyLock::new(|| "{}".into());
        Self(Arc::clone(&EMPTY))
    }

    /// Takes compact JSON text; refuses what is no object or larger than [`META_BYTES_MAX`].
    pub fn new(text: &str) -> Result<Self, Rejection> {
        if !text.starts_with('{') {
            return Err(Rejection::invalid("meta is a JSON object"));
        }
        if text.len() > META_BYTES_MAX {
            return Err(Rejection::PayloadTooLarge { what: "meta", limit_bytes: META_BYTES_MAX });
        }
        Ok(if text == "{}" { Self::empty() } else { Self(text.into()) })
    }

    /// The JSON text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        &*self.0 == "{}"
    }

    /// As a tree, for filters. Numbers beyond 64-bit floats make it null rather than fail: such text is stored
    /// faithfully, it only cannot be compared.
    #[must_use]
    pub fn parse(&self) -> serde_json::Value {
        serde_json::from_str(&self.0).unwrap_or(serde_json::Value::Null)
    }
}

/// One found vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Hit {
    /// Its id.
    pub id: VectorId,
    /// Higher is better; see [`Metric`].
    pub score: f32,
    /// Its metadata.
    pub meta: VectorMeta,
    /// Its numbers, when asked for.
    pub vector: Option<Vec<f32>>,
}
