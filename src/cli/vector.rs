//! `search`, `upsert`: vectors one at a time.

use super::output::{Colour, Output};
use super::{ServerFlags, argument_or_stdin, collection, json, path, post};
use clap::Args;
use serde_json::value::RawValue;

/// Flags of `kiss-vdb search`.
#[derive(Args, Debug)]
#[command(after_help = "One line for each hit, best first: score, id, metadata.

Examples:
  kiss-vdb search docs --id a -k 5
  kiss-vdb search docs --vector '[1,2,2]' --filter '{\"lang\":\"es\"}' --include-meta
  embed 'good morning' | kiss-vdb search docs --vector - --json | jq -r '.hits[].id'")]
#[group(id = "query", required = true, multiple = false, args = ["id", "vector"])]
pub struct SearchArgs {
    /// The collection
    #[arg(value_parser = collection)]
    collection: String,
    /// Near the vector of this id
    #[arg(long)]
    id: Option<String>,
    /// Near these numbers, as JSON; - reads them from stdin
    #[arg(long, value_name = "JSON", allow_hyphen_values = true)]
    vector: Option<String>,
    /// How many
    #[arg(short, value_name = "N", default_value_t = 10)]
    k: usize,
    /// Only what matches: {"lang":"es","n":{"$gte":3}}
    #[arg(long, value_name = "JSON")]
    filter: Option<String>,
    /// How widely the graph is searched
    #[arg(long, value_name = "N")]
    ef: Option<usize>,
    /// Look at every vector
    #[arg(long)]
    exact: bool,
    /// Say how it was found
    #[arg(long)]
    explain: bool,
    /// With metadata
    #[arg(long)]
    include_meta: bool,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// `kiss-vdb search`
pub async fn search(args: SearchArgs) -> anyhow::Result<()> {
    #[derive(serde::Serialize)]
    struct Body {
        k: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        vector: Option<Box<RawValue>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        filters: Option<Box<RawValue>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        ef: Option<usize>,
        exact: bool,
        explain: bool,
        include_meta: bool,
    }
    let vector = match &args.vector {
        Some(text) => Some(json(&argument_or_stdin(text).await?, "the vector")?),
        None => None,
    };
    let filters = args.filter.as_deref().map(|text| json(text, "the filter")).transpose()?;
    let SearchArgs { k, id, ef, exact, explain, include_meta, .. } = args;
    let body = serde_json::to_string(&Body { k, id, vector, filters, ef, exact, explain, include_meta })?;
    let route = format!("{}/search", path("/v1/vector/", &args.collection));
    let answer = post(&mut args.server.client()?, &route, body).await?;
    let mut out = Output::new();
    if args.server.json {
        return Ok(out.answer(&answer)?);
    }
    let found = answer.json()?;
    for hit in found["hits"].as_array().into_iter().flatten() {
        let score = out.paint(Colour::Green, &format!("{:.6}", hit["score"].as_f64().unwrap_or(f64::NAN)));
        let meta = hit.get("meta").map(|meta| format!("\t{meta}")).unwrap_or_default();
        out.line(&format!("{score}\t{}{meta}", hit["id"].as_str().unwrap_or_default()))?;
    }
    out.flush()?;
    if let Some(explain) = found.get("explain") {
        eprintln!("{explain} in {} µs", found["took_us"]);
    }
    Ok(())
}

/// Flags of `kiss-vdb upsert`.
#[derive(Args, Debug)]
#[command(
    after_help = "Replaces vector and metadata, or adds them. The collection must exist; for many vectors see import.

Example:
  kiss-vdb upsert docs a '[1,2,3]' --meta '{\"lang\":\"es\"}'"
)]
pub struct UpsertArgs {
    /// The collection
    #[arg(value_parser = collection)]
    collection: String,
    /// The vector's id
    id: String,
    /// Its numbers as JSON; - reads them from stdin
    vector: String,
    /// Its metadata
    #[arg(long, value_name = "JSON")]
    meta: Option<String>,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// `kiss-vdb upsert`
pub async fn upsert(args: UpsertArgs) -> anyhow::Result<()> {
    #[derive(serde::Serialize)]
    struct Body {
        id: String,
        vector: Box<RawValue>,
        #[serde(skip_serializing_if = "Option::is_none")]
        meta: Option<Box<RawValue>>,
    }
    let vector = json(&argument_or_stdin(&args.vector).await?, "the vector")?;
    let meta = args.meta.as_deref().map(|text| json(text, "the metadata")).transpose()?;
    let body = serde_json::to_string(&Body { id: args.id, vector, meta })?;
    let route = format!("{}/upsert", path("/v1/vector/", &args.collection));
    let answer = post(&mut args.server.client()?, &route, body).await?;
    super::key::show_write(&args.server, &answer)
}
