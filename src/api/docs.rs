//! What a person opens in a browser: the console, the contract as YAML, and the contract as a page. All embedded; nothing
//! is fetched from anywhere else.

use super::error::{ApiError, ApiResult};
use super::extract::Params;
use axum::http::{HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use std::fmt::Write;
use std::sync::OnceLock;
use yaml_rust2::{Yaml, YamlLoader};

/// The contract.
pub const OPENAPI: &str = include_str!("../../openapi.yaml");
const CONSOLE: &str = include_str!("../../console/index.html");
const STYLE: &str = include_str!("../../console/docs.css");

fn page(html: &'static str, scripts: &'static str) -> Response {
    let mut response = ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response();
    let headers = response.headers_mut();
    // Inline only, this server only: nothing a stored value contains can load or run anything else.
    let policy = match scripts {
        "" => "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        _ => {
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        }
    };
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// `GET /`
pub async fn console(uri: Uri) -> ApiResult {
    Params::parse(&uri, &[])?;
    Ok(page(CONSOLE, "inline"))
}

/// `GET /openapi.yaml`
pub async fn openapi(uri: Uri) -> ApiResult {
    Params::parse(&uri, &[])?;
    Ok(([(header::CONTENT_TYPE, "application/yaml; charset=utf-8")], OPENAPI).into_response())
}

/// `GET /docs`
pub async fn docs(uri: Uri) -> ApiResult {
    Params::parse(&uri, &[])?;
    static HTML: OnceLock<Option<String>> = OnceLock::new();
    let html = HTML.get_or_init(|| render(OPENAPI)).as_deref().ok_or(ApiError::Internal)?;
    Ok(page(html, ""))
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
    fn the_page_shows_every_operation_of_the_contract() {
        let html = render(OPENAPI).expect("the contract is YAML of the expected shape");
        let root = &YamlLoader::load_from_str(OPENAPI).unwrap()[0];
        for (path, _) in root["paths"].as_hash().unwrap() {
            assert!(html.contains(path.as_str().unwrap()), "{path:?}");
        }
        assert!(!html.contains("http://") && !html.contains("src="), "the page fetches nothing");
    }
}
