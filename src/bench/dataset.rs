//! Vectors to measure with: a data set with ground truth, as `dataset.json` describes it, or made-up ones.
//!
//! `dataset.json` names the files: `base` and `queries` (`.npy` of u8, f16 or f32, or gzipped IDX), `gt` (`.npy` of
//! i32, one row of base row numbers for each query, nearest first, -1 = none) and optionally `meta` (gzipped NDJSON, a
//! line for each base vector) with `filters`, each with a truth of its own.

use crate::npy;
use anyhow::{Context, bail, ensure};
use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;

/// Dimensions in which made-up vectors differ.
const LATENT: usize = 24;
/// Centres around which they lie.
const CENTRES: usize = 200;

/// Rows of equal length.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Matrix<T> {
    pub(super) width: usize,
    values: Vec<T>,
}

impl<T> Matrix<T> {
    fn new(width: usize, values: Vec<T>) -> anyhow::Result<Self> {
        ensure!(width > 0 && values.len().is_multiple_of(width), "{} values are not rows of {width}", values.len());
        Ok(Self { width, values })
    }

    pub(super) fn len(&self) -> usize {
        self.values.len() / self.width
    }

    pub(super) fn row(&self, index: usize) -> &[T] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    fn truncate(&mut self, rows: usize) {
        self.values.truncate(rows * self.width);
    }
}

/// What to put in, what to ask, and what the answers should be.
#[derive(Debug)]
pub(super) struct Dataset {
    pub(super) name: String,
    pub(super) metric: String,
    pub(super) base: Matrix<f32>,
    pub(super) queries: Matrix<f32>,
    /// JSON objects, one for each base vector; empty = none.
    pub(super) meta: Vec<String>,
    /// `None` when it would not hold: made-up vectors, or only a part of the base.
    truth: Option<Matrix<i32>>,
    filters: Vec<Filtered>,
}

#[derive(Debug)]
struct Filtered {
    name: String,
    filter: Value,
    truth: Matrix<i32>,
}

/// A search to measure: a filter of ours and the truth that goes with it.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) filter: Option<Value>,
    pub(super) truth: Option<Matrix<i32>>,
}

#[derive(Deserialize)]
struct Description {
    name: String,
    metric: String,
    dim: usize,
    base: String,
    queries: String,
    gt: String,
    meta: Option<String>,
    #[serde(default)]
    filters: Vec<FilterDescription>,
}

#[derive(Deserialize)]
struct FilterDescription {
    name: String,
    field: String,
    op: String,
    value: Option<Value>,
    gte: Option<Value>,
    lte: Option<Value>,
    gt: String,
}

impl FilterDescription {
    /// The same condition in our own filter language.
    fn translate(&self) -> anyhow::Result<Value> {
        let condition = match (self.op.as_str(), &self.value) {
            ("eq", Some(value)) => json!({ "$eq": value }),
            ("in", Some(value)) => json!({ "$in": value }),
            ("range", None) => {
                let bounds = [("$gte", &self.gte), ("$lte", &self.lte)];
                let bounds: serde_json::Map<_, _> =
                    bounds.into_iter().filter_map(|(name, bound)| Some((name.to_owned(), bound.clone()?))).collect();
                ensure!(!bounds.is_empty(), "filter {}: a range without bounds", self.name);
                Value::Object(bounds)
            }
            (op, _) => bail!("filter {}: cannot translate {op:?}", self.name),
        };
        Ok(json!({ &self.field: condition }))
    }
}

impl Dataset {
    /// Reads a data set; with `n`, only the first `n` base vectors, and then without truth.
    pub(super) fn load(dir: &Path, n: Option<usize>) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(dir.join("dataset.json"))
            .with_context(|| format!("no data set in {}", dir.display()))?;
        let description: Description = serde_json::from_str(&text).context("dataset.json")?;
        let mut base = read_vectors(&dir.join(&description.base))?;
        let queries = read_vectors(&dir.join(&description.queries))?;
        ensure!(
            base.width == description.dim && queries.width == description.dim,
            "the files are not of dim {}",
            description.dim
        );
        let whole = n.is_none_or(|n| n >= base.len());
        let mut meta =
            description.meta.as_ref().map(|name| read_lines(&dir.join(name))).transpose()?.unwrap_or_default();
        ensure!(meta.is_empty() || meta.len() == base.len(), "{} lines of meta for {} vectors", meta.len(), base.len());
        let truth = |name: &str| read_truth(&dir.join(name), queries.len());
        let filters = description
            .filters
            .iter()
            .map(|f| Ok(Filtered { name: f.name.clone(), filter: f.translate()?, truth: truth(&f.gt)? }));
        let filters = filters.collect::<anyhow::Result<_>>()?;
        let truth = whole.then(|| truth(&description.gt)).transpose()?;
        if let Some(n) = n {
            base.truncate(n);
            meta.truncate(n);
        }
        Ok(Self { name: description.name, metric: description.metric, base, queries, meta, truth, filters })
    }

    /// Made-up vectors, always the same: points of a space of [`LATENT`] dimensions, around centres, spread over `dim`
    /// numbers by a random map. Embeddings are like that; numbers drawn one by one would all be equally far apart. Real
    /// data tell more.
    pub(super) fn made_up(n: usize, queries: usize, dim: usize) -> anyhow::Result<Self> {
        let mut state = 1;
        let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| uniform(&mut state)).collect() };
        let (map, centres) = (draw(LATENT * dim), draw(LATENT * CENTRES));
        let mut rows = |count: usize| {
            let mut values = Vec::with_capacity(count * dim);
            for _ in 0..count {
                let centre = (draw(1)[0].abs() * CENTRES as f32) as usize % CENTRES * LATENT;
                let latent: Vec<f32> =
                    draw(LATENT).iter().zip(&centres[centre..]).map(|(own, centre)| own * 0.7 + centre).collect();
                values.extend((0..dim).map(|at| {
                    let weights = &map[at * LATENT..(at + 1) * LATENT];
                    latent.iter().zip(weights).map(|(l, w)| l * w).sum::<f32>()
                }));
            }
            Matrix::new(dim, values)
        };
        let (base, queries) = (rows(n)?, rows(queries)?);
        let (name, metric) = (format!("made-up-{dim}"), "cosine".to_owned());
        Ok(Self { name, metric, base, queries, meta: Vec::new(), truth: None, filters: Vec::new() })
    }

    /// The searches for these filter names; `none` = unfiltered. No name = just unfiltered.
    pub(super) fn cases(&self, names: &[String]) -> anyhow::Result<Vec<Case>> {
        let unfiltered = || Case { name: "none".to_owned(), filter: None, truth: self.truth.clone() };
        if names.is_empty() {
            return Ok(vec![unfiltered()]);
        }
        let case = |name: &String| {
            if name == "none" {
                return Ok(unfiltered());
            }
            let found = self.filters.iter().find(|f| f.name == *name).with_context(|| {
                let known: Vec<_> = self.filters.iter().map(|f| f.name.as_str()).collect();
                format!("no filter {name:?} in {}; there are: none {}", self.name, known.join(" "))
            })?;
            let truth = self.truth.as_ref().map(|_| found.truth.clone());
            Ok(Case { name: found.name.clone(), filter: Some(found.filter.clone()), truth })
        };
        names.iter().map(case).collect()
    }
}

/// Of the `k` nearest that exist, how many were found: (found, of).
pub(super) fn count_found(truth: &[i32], k: usize, ids: &[usize]) -> (usize, usize) {
    let nearest = truth.iter().take(k).filter_map(|&id| usize::try_from(id).ok());
    nearest.fold((0, 0), |(found, of), id| (found + usize::from(ids.iter().take(k).any(|&i| i == id)), of + 1))
}

/// In -1 to 1. SplitMix64 (Steele, Lea, Flood 2014): even, and the same everywhere.
pub(super) fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn gunzip(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut out = Vec::new();
    MultiGzDecoder::new(bytes).read_to_end(&mut out)?;
    Ok(out)
}

fn read_lines(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = String::from_utf8(gunzip(&read(path)?)?).with_context(|| path.display().to_string())?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn read_vectors(path: &Path) -> anyhow::Result<Matrix<f32>> {
    let bytes = read(path)?;
    let vectors =
        if bytes.starts_with(npy::MAGIC) { npy_vectors(&bytes) } else { gunzip(&bytes).and_then(|b| idx_vectors(&b)) };
    vectors.with_context(|| path.display().to_string())
}

fn read_truth(path: &Path, queries: usize) -> anyhow::Result<Matrix<i32>> {
    let truth = npy_truth(&read(path)?).with_context(|| path.display().to_string())?;
    ensure!(truth.len() == queries, "{}: {} rows for {queries} queries", path.display(), truth.len());
    Ok(truth)
}

/// A whole file: what its header says, and its values.
fn npy(bytes: &[u8]) -> anyhow::Result<(npy::Header, &[u8])> {
    let mut values = bytes;
    let header = npy::Header::read(&mut values)?;
    ensure!(Some(values.len()) == header.value_bytes(), "{} bytes of values", values.len());
    Ok((header, values))
}

fn npy_vectors(bytes: &[u8]) -> anyhow::Result<Matrix<f32>> {
    let (header, values) = npy(bytes)?;
    Matrix::new(header.width, header.floats(values)?)
}

fn npy_truth(bytes: &[u8]) -> anyhow::Result<Matrix<i32>> {
    let (header, values) = npy(bytes)?;
    ensure!(header.descr == "<i4", "the truth is {:?}, not i32", header.descr);
    Matrix::new(header.width, values.as_chunks().0.iter().map(|&v| i32::from_le_bytes(v)).collect())
}

/// IDX of unsigned bytes with three dimensions: a magic number, the counts of images, rows and columns, the pixels.
#[expect(clippy::big_endian_bytes, reason = "the IDX format is big-endian")]
fn idx_vectors(bytes: &[u8]) -> anyhow::Result<Matrix<f32>> {
    let (head, pixels) = bytes.split_first_chunk::<16>().context("cut short")?;
    let (words, _) = head.as_chunks::<4>();
    let [magic, count, rows, columns] = [0, 1, 2, 3].map(|i| u32::from_be_bytes(words[i]) as usize);
    ensure!(magic == 0x803, "not an IDX file of images");
    let width = rows * columns;
    ensure!(pixels.len() == count * width, "{} pixels for {count} images of {width}", pixels.len());
    Matrix::new(width, pixels.iter().map(|&p| f32::from(p)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vector::filter::Filter;
    use half::f16;
    use std::io::Write;

    fn npy(descr: &str, shape: &str, values: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}   \n");
        let mut out = [npy::MAGIC, b"\x01\x00"].concat();
        out.extend_from_slice(&u16::try_from(header.len()).unwrap().to_le_bytes());
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(values);
        out
    }

    fn f16s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
    }

    fn i32s(values: &[i32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn npy_files_of_each_type_are_read() {
        let expected = Matrix::new(2, vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(npy_vectors(&npy("|u1", "2, 2", &[1, 2, 3, 4])).unwrap(), expected);
        assert_eq!(npy_vectors(&npy("<f2", "2, 2", &f16s(&[1.0, 2.0, 3.0, 4.0]))).unwrap(), expected);
        let truth = npy_truth(&npy("<i4", "2, 1", &i32s(&[7, -1]))).unwrap();
        assert_eq!((truth.len(), truth.row(1)), (2, [-1].as_slice()));
    }

    #[test]
    fn a_damaged_npy_file_is_refused() {
        for (name, bytes) in [
            ("not npy", b"PK\x03\x04".to_vec()),
            ("cut in the header", npy("|u1", "2, 2", &[1, 2, 3, 4])[..20].to_vec()),
            ("cut in the values", npy("|u1", "2, 2", &[1, 2, 3])),
            ("one dimension", npy("|u1", "4,", &[1, 2, 3, 4])),
            ("big-endian", npy(">f2", "1, 2", &[0; 4])),
        ] {
            assert!(npy_vectors(&bytes).is_err(), "{name}");
        }
        assert!(npy_truth(&npy("<f4", "1, 1", &[0; 4])).is_err());
    }

    #[test]
    fn idx_images_become_rows() {
        let idx = [&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3][..], &[1, 2, 3, 4, 5, 255]].concat();
        let images = idx_vectors(&idx).unwrap();
        assert_eq!((images.len(), images.row(1)), (2, [4.0, 5.0, 255.0].as_slice()));
        assert!(idx_vectors(&idx[..20]).is_err());
    }

    fn describe(op: &str, more: Value) -> FilterDescription {
        let mut all = json!({ "name": "f", "field": "year", "op": op, "gt": "x.npy" });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn filters_translate_into_ours_and_match_the_same() {
        let meta = [json!({"year": 2021}), json!({"year": 2022}), json!({"year": 2024}), json!({"name": "x"})];
        for (op, more, expected) in [
            ("eq", json!({"value": 2022}), [false, true, false, false]),
            ("in", json!({"value": [2021, 2024]}), [true, false, true, false]),
            ("range", json!({"gte": 2022, "lte": 2024}), [false, true, true, false]),
            ("range", json!({"lte": 2022}), [true, true, false, false]),
        ] {
            let translated = describe(op, more).translate().unwrap();
            let filter = Filter::parse(&translated).unwrap();
            assert_eq!(meta.each_ref().map(|m| filter.matches(m)), expected, "{translated}");
        }
        assert!(describe("near", json!({"value": 1})).translate().is_err());
        assert!(describe("range", json!({})).translate().is_err());
    }

    #[test]
    fn recall_counts_only_what_can_be_found() {
        assert_eq!(count_found(&[4, 2, 9, 7], 3, &[9, 4, 7]), (2, 3));
        assert_eq!(count_found(&[4, -1, -1], 3, &[4]), (1, 1));
        assert_eq!(count_found(&[-1, -1], 2, &[]), (0, 0));
    }

    #[test]
    fn a_part_of_a_data_set_has_no_truth() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        let filters = json!([{"name": "old", "field": "year", "op": "eq", "value": 1, "gt": "old.npy"}]);
        let description = json!({"name": "tiny", "metric": "l2", "dim": 2, "base": "b.npy", "queries": "q.npy", "gt": "gt.npy",
            "meta": "meta.gz", "filters": filters});
        put("dataset.json", description.to_string().as_bytes());
        put("b.npy", &npy("|u1", "3, 2", &[1, 2, 3, 4, 5, 6]));
        put("q.npy", &npy("|u1", "1, 2", &[1, 2]));
        put("gt.npy", &npy("<i4", "1, 2", &i32s(&[0, 1])));
        put("old.npy", &npy("<i4", "1, 2", &i32s(&[2, -1])));
        put("meta.gz", &gzip(b"{}\n{}\n{\"year\":1}\n"));
        let names = ["none".to_owned(), "old".to_owned()];
        let whole = Dataset::load(dir.path(), None).unwrap();
        assert_eq!((whole.base.len(), whole.meta.len()), (3, 3));
        assert!(whole.cases(&names).unwrap().iter().all(|c| c.truth.is_some()));
        let part = Dataset::load(dir.path(), Some(2)).unwrap();
        assert_eq!((part.base.len(), part.meta.len()), (2, 2));
        assert!(part.cases(&names).unwrap().iter().all(|c| c.truth.is_none()));
        assert!(part.cases(&["new".to_owned()]).is_err());
    }
}
