//! What a person opens in a browser: the console, the contract as YAML, and the contract as a page. All embedded; nothing
//! is fetched from anywhere else.

use super::error::{ApiError, ApiResult};
use super::extract::{Fields, Head, Params};
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use std::fmt::Write;
use std::sync::OnceLock;
use yaml_rust2::{Yaml, YamlLoader};

/// The contract.
pub const OPENAPI: &str = include_str!("../../openapi.yaml");
const CONSOLE: &str = include_str!("../../console/index.html");
const STYLE: &str = include_str!("../../console/docs.css");

/// What the console is made of besides its page, served below `/console/`.
pub const ASSETS: &[(&str, &str)] = &[
    ("app.css", include_str!("../../console/app.css")),
    ("app.js", include_str!("../../console/app.js")),
    ("chart.js", include_str!("../../console/chart.js")),
    ("events.js", include_str!("../../console/events.js")),
    ("jobs.js", include_str!("../../console/jobs.js")),
    ("key.js", include_str!("../../console/key.js")),
    ("lib.js", include_str!("../../console/lib.js")),
    ("list.js", include_str!("../../console/list.js")),
    ("map.js", include_str!("../../console/map.js")),
    ("overview.js", include_str!("../../console/overview.js")),
    ("server.js", include_str!("../../console/server.js")),
    ("state.js", include_str!("../../console/state.js")),
    ("theme.js", include_str!("../../console/theme.js")),
    ("tree.js", include_str!("../../console/tree.js")),
    ("vectors.js", include_str!("../../console/vectors.js")),
];

/// The console may run and load what this server embeds, nothing that stands inline and nothing from elsewhere: a stored
/// value that got into the page as markup would still be dead.
const CONSOLE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// The contract's page brings its style inline and has no script.
const DOCS_POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";

/// An embedded file. Browsers ask again each time and are told 304 while the program is the same, so that a new release
/// is never half old.
fn file(headers: &Fields, content_type: &'static str, content: &'static str) -> Response {
    let tag = format!("\"{:08x}\"", crc32c::crc32c(content.as_bytes()));
    let asked = headers.first(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let is_known = asked.split(',').any(|t| t.trim().trim_start_matches("W/") == tag);
    let mut response = if is_known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, content_type)], content).into_response()
    };
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::try_from(tag) {
        headers.insert(header::ETAG, tag);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

fn page(headers: &Fields, html: &'static str, policy: &'static str) -> Response {
    let mut response = file(headers, "text/html; charset=utf-8", html);
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

/// `GET /`
pub async fn console(Head { uri, headers, .. }: Head) -> ApiResult {
    Params::parse(&uri, &[])?;
    Ok(page(&headers, CONSOLE, CONSOLE_POLICY).into())
}

/// `GET /console/{file}`
pub async fn asset(name: Result<Path<String>, PathRejection>, Head { uri, headers, .. }: Head) -> ApiResult {
    Params::parse(&uri, &[])?;
    let Path(name) = name.map_err(|_| ApiError::RouteNotFound)?;
    let (name, content) = ASSETS.iter().find(|(known, _)| *known == name).ok_or(ApiError::RouteNotFound)?;
    let content_type =
        if name.ends_with(".css") { "text/css; charset=utf-8" } else { "text/javascript; charset=utf-8" };
    Ok(file(&headers, content_type, content).into())
}

/// `GET /openapi.yaml`
pub async fn openapi(uri: Uri) -> ApiResult {
    Params::parse(&uri, &[])?;
    Ok(([(header::CONTENT_TYPE, "application/yaml; charset=utf-8")], OPENAPI).into_response().into())
}

/// `GET /docs`
pub async fn docs(Head { uri, headers, .. }: Head) -> ApiResult {
    Params::parse(&uri, &[])?;
    static HTML: OnceLock<Option<String>> = OnceLock::new();
    let html = HTML.get_or_init(|| render(OPENAPI)).as_deref().ok_or(ApiError::Internal)?;
    Ok(page(&headers, html, DOCS_POLICY).into())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Text of the contract as HTML: paragraphs, and code between backticks.
fn prose(text: &str) -> String {
    let mut out = String::new();
    for paragraph in text.split("\n\n").map(str::trim).filter(|p| !p.is_empty()) {
        let mut is_code = false;
        out.push_str("<p>");
        for part in escape(paragraph).split('`') {
            if is_code {
                out.push_str("<code>");
                out.push_str(part);
                out.push_str("</code>");
            } else {
                out.push_str(part);
            }
            is_code = !is_code;
        }
        out.push_str("</p>");
    }
    out
}

fn text<'a>(yaml: &'a Yaml, name: &str) -> &'a str {
    yaml[name].as_str().unwrap_or_default()
}

/// Follows a local `$ref`.
fn resolve<'a>(root: &'a Yaml, yaml: &'a Yaml) -> &'a Yaml {
    match yaml["$ref"].as_str() {
        Some(path) => path.trim_start_matches("#/").split('/').fold(root, |at, name| &at[name]),
        None => yaml,
    }
}

/// The contract as one page; `None` when it is not YAML, which a test rules out.
fn render(openapi: &str) -> Option<String> {
    let documents = YamlLoader::load_from_str(openapi).ok()?;
    let root = documents.first()?;
    let mut out = String::new();
    let title = escape(text(&root["info"], "title"));
    write!(out, "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title><style>{STYLE}</style><body><main><h1>{title}</h1>").ok()?;
    out.push_str(&prose(text(&root["info"], "description")));
    out.push_str("<nav><ul>");
    let mut body = String::new();
    for (path, methods) in root["paths"].as_hash()? {
        let path = path.as_str()?;
        for (method, operation) in methods.as_hash()? {
            let method = method.as_str()?;
            if method == "parameters" {
                continue;
            }
            let id = text(operation, "operationId");
            let verb = method.to_uppercase();
            let summary = escape(text(operation, "summary"));
            write!(out, "<li><a href='#{id}'><b>{verb}</b> {}</a> {summary}", escape(path)).ok()?;
            write!(body, "<section id='{id}'><h2><b>{verb}</b> {}</h2><p class=summary>{summary}</p>", escape(path))
                .ok()?;
            body.push_str(&prose(text(operation, "description")));
            render_parameters(&mut body, root, &[&methods["parameters"], &operation["parameters"]])?;
            render_body(&mut body, root, &resolve(root, &operation["requestBody"])["content"])?;
            render_responses(&mut body, root, operation)?;
            body.push_str("</section>");
        }
    }
    out.push_str("</ul></nav>");
    out.push_str(&body);
    out.push_str("</main></body></html>");
    Some(out)
}

fn render_parameters(out: &mut String, root: &Yaml, lists: &[&Yaml]) -> Option<()> {
    let mut rows = String::new();
    for parameter in lists.iter().filter_map(|l| l.as_vec()).flatten() {
        let parameter = resolve(root, parameter);
        let (name, place) = (escape(text(parameter, "name")), escape(text(parameter, "in")));
        write!(rows, "<tr><td><code>{name}</code><td>{place}<td>{}", prose(text(parameter, "description"))).ok()?;
    }
    if !rows.is_empty() {
        write!(out, "<table><tr><th>parameter<th>in<th>meaning{rows}</table>").ok()?;
    }
    Some(())
}

fn render_body(out: &mut String, root: &Yaml, content: &Yaml) -> Option<()> {
    let Some(types) = content.as_hash() else { return Some(()) };
    for (media_type, media) in types {
        write!(out, "<h3>body <code>{}</code></h3>", escape(media_type.as_str()?)).ok()?;
        render_schema(out, root, &media["schema"])?;
    }
    Some(())
}

fn render_schema(out: &mut String, root: &Yaml, schema: &Yaml) -> Option<()> {
    let schema = resolve(root, schema);
    out.push_str(&prose(text(schema, "description")));
    let Some(properties) = schema["properties"].as_hash() else { return Some(()) };
    let required: Vec<_> = schema["required"].as_vec().into_iter().flatten().filter_map(|r| r.as_str()).collect();
    out.push_str("<table><tr><th>field<th>type<th>meaning");
    for (name, property) in properties {
        let name = name.as_str()?;
        let property = resolve(root, property);
        let mark = if required.contains(&name) { "" } else { "?" };
        let meaning = prose(text(property, "description"));
        write!(out, "<tr><td><code>{}{mark}</code><td>{}<td>{meaning}", escape(name), escape(text(property, "type")))
            .ok()?;
    }
    out.push_str("</table>");
    Some(())
}

fn render_responses(out: &mut String, root: &Yaml, operation: &Yaml) -> Option<()> {
    out.push_str("<h3>answers</h3><table>");
    for (status, response) in operation["responses"].as_hash()? {
        let response = resolve(root, response);
        let status = status.as_str().map(str::to_owned).or_else(|| status.as_i64().map(|n| n.to_string()))?;
        write!(out, "<tr><td><b>{status}</b><td>{}", prose(text(response, "description"))).ok()?;
    }
    out.push_str("</table>");
    for (_, response) in
        operation["responses"].as_hash()?.iter().filter(|(s, _)| s.as_str().is_some_and(|s| s.starts_with('2')))
    {
        render_body(out, root, &resolve(root, response)["content"])?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_names_only_files_that_are_embedded() {
        let html = CONSOLE.split("/console/").skip(1).map(|rest| rest.split('"').next().unwrap_or_default());
        let scripts = ASSETS.iter().flat_map(|(_, text)| text.split("from './").skip(1));
        let imports = scripts.map(|rest| rest.split('\'').next().unwrap_or_default());
        let mut named = 0;
        for name in html.chain(imports) {
            assert!(ASSETS.iter().any(|(known, _)| *known == name), "{name} is not in ASSETS");
            named += 1;
        }
        assert!(named > 10, "the page links its files");
    }

    #[test]
    fn the_page_shows_every_operation_of_the_contract() {
        let html = render(OPENAPI).expect("the contract is YAML of the expected shape");
        let root = &YamlLoader::load_from_str(OPENAPI).unwrap()[0];
        for (path, _) in root["paths"].as_hash().unwrap() {
            assert!(html.contains(path.as_str().unwrap()), "{path:?}");
        }
        assert!(!html.contains("http://") && !html.contains("src="), "the page fetches nothing");
    }
}
