// Swagger UI over this server's own schema. It writes descriptions as markup, which its own DOMPurify has cleaned and
// which come from this server alone.
globalThis.trustedTypes?.createPolicy('default', { createHTML: markup => markup });

SwaggerUIBundle({
  url: new URL('../openapi.json', import.meta.url).href,
  dom_id: '#swagger-ui',
  deepLinking: true,
  validatorUrl: null, // no other server is asked
});
